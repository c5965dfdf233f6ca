package pvnet_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/pvnet/netif"
	"barevif/telemetry"
	"barevif/telemetry/logtest"
	"barevif/xenbus/toolstack"
)

// published returns the keys of dir and of the directories below it that were not among
// old. Those that are numbers of this machine, grants and ports, have the value "n".
func (l *lab) published(dir string, old map[string]string) map[string]string {
	now := l.keys(dir)
	maps.DeleteFunc(now, func(key, value string) bool { was, ok := old[key]; return ok && was == value })
	for key := range now {
		if strings.HasSuffix(key, "-ring-ref") || strings.Contains(key, "event-channel") && !strings.HasPrefix(key, "feature-") || key == "claim" {
			now[key] = "n"
		}
	}
	return now
}

func (l *lab) keys(dir string) map[string]string {
	all := make(map[string]string)
	names, err := l.tools.Directory(ctx(l.t), dir)
	if err != nil {
		l.t.Fatal(err)
	}
	for _, name := range names {
		below := l.keys(dir + "/" + name)
		for key, value := range below {
			all[name+"/"+key] = value
		}
		if len(below) == 0 {
			all[name] = l.read(dir + "/" + name)
		}
	}
	return all
}

// Each end publishes what it uses, and nothing else: a key of a feature that an end has
// no use for would have its peer do work for nothing, or wait for what never comes. What
// other drivers left there goes.
func TestEachEndPublishesWhatItUsesAndNothingElse(t *testing.T) {
	front := map[string]string{
		"state": "4", "request-rx-copy": "1", "feature-rx-notify": "1", "feature-sg": "1", "feature-no-csum-offload": "1",
	}
	back := map[string]string{
		"state": "4", "claim": "n", "hotplug-status": "connected",
		"feature-rx-copy": "1", "feature-sg": "1", "feature-split-event-channels": "1", "feature-no-csum-offload": "1",
		"feature-multicast-control": "1", "feature-dynamic-multicast-control": "1",
	}
	offload := map[string]string{
		"feature-ipv6-csum-offload": "1", "feature-gso-tcpv4": "1", "feature-gso-tcpv6": "1",
	}
	queue := func(prefix string) map[string]string {
		all := make(map[string]string)
		for _, key := range []string{"tx-ring-ref", "rx-ring-ref", "event-channel-tx", "event-channel-rx"} {
			all[prefix+key] = "n"
		}
		return all
	}
	ctrl := map[string]string{"ctrl-ring-ref": "n", "event-channel-ctrl": "n"}
	severalBack := map[string]string{"multi-queue-max-queues": "3", "feature-ctrl-ring": "1"}
	with := func(all ...map[string]string) map[string]string {
		sum := make(map[string]string)
		for _, m := range all {
			maps.Copy(sum, m)
		}
		maps.DeleteFunc(sum, func(_, value string) bool { return value == "" })
		return sum
	}
	for name, c := range map[string]struct {
		front, back         pvnet.Config
		wantFront, wantBack map[string]string
	}{
		"nothing": {
			wantFront: with(front, queue("")),
			wantBack:  back,
		},
		"offloads": {
			front:     pvnet.Config{Offload: true},
			back:      pvnet.Config{Offload: true},
			wantFront: with(front, queue(""), offload, map[string]string{"feature-no-csum-offload": ""}),
			wantBack:  with(back, offload, map[string]string{"feature-no-csum-offload": ""}),
		},
		"offloads of the frontend only, lent": {
			front:     pvnet.Config{Offload: true, LendRx: true},
			wantFront: with(front, queue(""), offload, map[string]string{"feature-no-csum-offload": ""}),
			wantBack:  back,
		},
		"queues": {
			front:     pvnet.Config{Queues: 2},
			back:      pvnet.Config{Queues: 3},
			wantFront: with(front, queue("queue-0/"), queue("queue-1/"), ctrl, map[string]string{"multi-queue-num-queues": "2"}),
			wantBack:  with(back, severalBack),
		},
		"one queue of several": {
			back:      pvnet.Config{Queues: 3},
			wantFront: with(front, queue("")),
			wantBack:  with(back, severalBack),
		},
		"one queue, several asked for": {
			front:     pvnet.Config{Queues: 3},
			wantFront: with(front, queue("")),
			wantBack:  back,
		},
	} {
		for _, left := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, left by others %v", name, left), func(t *testing.T) {
				l := newLabOn(t, emu.Config{})
				fdom, bdom := l.domain(1), l.domain(2)
				v := l.add(toolstack.Vif{Front: 1, Back: 2, MTU: 9000})
				oldFront, oldBack := l.keys(v.FrontDir()), l.keys(v.BackDir())
				if left {
					for _, key := range []string{
						netif.KeyFeatureGSOTCPv4, netif.KeyFeatureGSOTCPv6, netif.KeyFeatureGSOTCPv4Prefix, netif.KeyFeatureGSOTCPv6Prefix,
						netif.KeyFeatureIPv6CsumOffload, netif.KeyFeatureNoCsumOffload, netif.KeyRequestMulticast, netif.KeyCtrlRingRef, netif.KeyEventChannelCtrl,
						netif.KeyXDPHeadroom, netif.KeyNumQueues, netif.KeyEventChannel, "queue-5/tx-ring-ref",
					} {
						l.write(v.FrontDir()+"/"+key, "1")
					}
					for _, key := range []string{
						netif.KeyFeatureGSOTCPv4, netif.KeyFeatureGSOTCPv6, netif.KeyFeatureGSOTCPv4Prefix, netif.KeyFeatureGSOTCPv6Prefix,
						netif.KeyFeatureIPv6CsumOffload, netif.KeyFeatureMulticastControl, netif.KeyFeatureDynamicMulticast,
						netif.KeyFeatureCtrlRing, netif.KeyFeatureXDPHeadroom, netif.KeyFeatureRxFlip, netif.KeyMaxQueues, netif.KeyCarrier,
					} {
						l.write(v.BackDir()+"/"+key, "1")
					}
				}
				backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true, Config: c.back})
				dev, err := pvnet.Connect(ctx(t), fdom, "0", c.front)
				if err != nil {
					t.Fatal(err)
				}
				defer func() {
					dev.Disconnect()
					if there := slices.Collect(maps.Keys(l.published(v.FrontDir(), oldFront))); len(netif.RareKeys(there)) > 0 {
						t.Errorf("after the end: %q", netif.RareKeys(there))
					}
				}()
				await(t, wait(t, backs), true)
				for dir, want := range map[string]map[string]string{v.FrontDir(): c.wantFront, v.BackDir(): c.wantBack} {
					old := oldFront
					if dir == v.BackDir() {
						old = oldBack
					}
					if got := l.published(dir, old); !maps.Equal(got, want) {
						t.Errorf("%s:\n%s\nwant\n%s", dir, list(got), list(want))
					}
				}
			})
		}
	}
}

func list(m map[string]string) string {
	var lines []string
	for _, key := range slices.Sorted(maps.Keys(m)) {
		lines = append(lines, key+" = "+m[key])
	}
	return strings.Join(lines, "\n")
}

func (l *lab) write(path, value string) {
	l.t.Helper()
	if err := l.tools.Write(ctx(l.t), path, value); err != nil {
		l.t.Fatal(err)
	}
}

// The backend is not trusted: frames that it sends are not lent, and its page changes
// nothing in a frame that was received. An unusable value of the key counts as "0".
func TestNoPageIsLentToAReaderIfTheBackendIsNotTrusted(t *testing.T) {
	for value, trusted := range map[string]bool{"1": true, "0": false, "yes": false} {
		t.Run(value, func(t *testing.T) {
			log := new(logtest.Log)
			l := newLab(t)
			fdom, bdom := l.domain(1), l.domain(2)
			v := l.add(toolstack.Vif{Front: 1, Back: 2})
			l.write(v.FrontDir()+"/trusted", value)
			backs, _ := l.serve(bdom, pvnet.ServeConfig{Hotplug: true})
			front, err := pvnet.Connect(ctx(t), fdom, "0", pvnet.Config{LendRx: true, Logger: log.Logger()})
			if err != nil {
				t.Fatal(err)
			}
			defer front.Disconnect()
			back := wait(t, backs)
			await(t, back, true)
			rx, err := front.OwnRX(0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := back.Write(frame(1000, 1)); err != nil {
				t.Fatal(err)
			}
			var f [1]pvnet.Frame
			if _, err := rx.Receive(f[:]); err != nil {
				t.Fatal(err)
			}
			rx.Release(f[:])
			st := front.Stats()
			if lent := st.RX.Get(telemetry.LentPackets) == 1; lent != trusted || front.Trusted() != trusted {
				t.Errorf("lent %v, trusted %v", lent, front.Trusted())
			}
			if n := len(log.Lines("lent")); (n == 1) == trusted {
				t.Errorf("%d log lines say that nothing is lent:\n%s", n, log)
			}
			if n := len(log.Lines("value=" + value)); (n == 1) != (value == "yes") {
				t.Errorf("%d log lines name the value:\n%s", n, log)
			}
		})
	}
}
