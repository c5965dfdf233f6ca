//go:build linux

package bpf

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"barevif/telemetry"
)

// textLimit bounds how much of a metrics file is read, in bytes.
const textLimit = 16 << 20

// readText makes a report of the iterator's output.
func readText(src Source) (*Report, error) {
	dir, leave, err := src.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	// A link in the directory could lead to a file that only this user may read, and an
	// error would show a line of it.
	f, err := os.OpenFile(filepath.Join(dir, pinMetrics), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	if uint32(st.Type) != unix.BPF_FS_MAGIC {
		return nil, fmt.Errorf("%w: the metrics are not in a BPF file system", ErrLayout)
	}
	queues, err := parseText(io.LimitReader(f, textLimit))
	if err != nil {
		return nil, err
	}
	return &Report{Stats: telemetry.Sum(queues)}, nil
}

// A sample is where the value of a line of text belongs in an element of the counters.
type sample struct{ word, words int } // words > 1: the buckets and the sum of a histogram

// samples returns the place of each sample by its name.
func samples() map[string]sample {
	places := map[string]sample{}
	for _, d := range [...]telemetry.Dir{telemetry.RX, telemetry.TX} {
		for _, f := range telemetry.Fields() {
			at := sample{int(d)*telemetry.BlockWords + f.Word, f.Words()}
			name := f.Metric(d)
			switch f.Kind {
			case telemetry.KindCounter:
				places[name+"_total"] = at
			case telemetry.KindGauge:
				places[name] = at
			case telemetry.KindHistogram:
				places[name+"_bucket"] = at
				places[name+"_sum"] = sample{at.word + at.words - 1, 1}
			}
		}
	}
	return places
}

// parseSample parses a line of text.
func parseSample(line string) (name string, queue int, value uint64, err error) {
	name, rest, ok1 := strings.Cut(line, "{")
	_, rest, ok2 := strings.Cut(rest, `queue="`)
	q, rest, ok3 := strings.Cut(rest, `"`)
	_, v, ok4 := strings.Cut(rest, "} ")
	queue, err1 := strconv.Atoi(q)
	value, err2 := strconv.ParseUint(v, 10, 64)
	if !ok1 || !ok2 || !ok3 || !ok4 || err1 != nil || err2 != nil || queue < 0 || queue >= maxQueues {
		return "", 0, 0, fmt.Errorf("%w: %q", ErrLayout, str([]byte(line)))
	}
	return name, queue, value, nil
}

// parseText parses the text that openmetrics.Write makes for one device.
func parseText(r io.Reader) ([]telemetry.Queue, error) {
	places := samples()
	var queues [][queueWords]uint64
	var before uint64 // count of the previous bucket, since the text is cumulative
	var of struct {   // the histogram that the previous bucket belongs to
		name  string
		queue int
	}
	bucket := 0
	ended := false
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		line := lines.Text()
		if ended = line == "# EOF"; ended {
			break
		}
		if line == "" || line[0] == '#' {
			continue
		}
		name, q, v, err := parseSample(line)
		if err != nil {
			return nil, err
		}
		at, ok := places[name]
		if !ok {
			continue // a histogram's count, or a field of a later version
		}
		for len(queues) <= q {
			queues = append(queues, [queueWords]uint64{})
		}
		if at.words == 1 {
			queues[q][at.word] = v
			continue
		}
		if of.name != name || of.queue != q {
			of.name, of.queue = name, q
			bucket, before = 0, 0
		}
		if bucket >= at.words-1 {
			return nil, fmt.Errorf("%w: too many buckets in %s", ErrLayout, name)
		}
		if v < before {
			return nil, fmt.Errorf("%w: fewer in a higher bucket of %s", ErrLayout, name)
		}
		queues[q][at.word+bucket] = v - before
		bucket, before = bucket+1, v
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if !ended {
		return nil, fmt.Errorf("%w: the text has no end", ErrLayout)
	}
	out := make([]telemetry.Queue, len(queues))
	for q := range queues {
		out[q].RX = telemetry.ValuesOf((*[telemetry.BlockWords]uint64)(queues[q][:telemetry.BlockWords]))
		out[q].TX = telemetry.ValuesOf((*[telemetry.BlockWords]uint64)(queues[q][telemetry.BlockWords:]))
	}
	return out, nil
}
