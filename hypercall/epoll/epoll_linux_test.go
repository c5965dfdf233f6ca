package epoll

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// limit bounds what should happen at once.
const limit = time.Minute

func both(t *testing.T, f func(t *testing.T, s *Set)) {
	for name, onThread := range map[string]bool{"goroutine": false, "thread": true} {
		t.Run(name, func(t *testing.T) {
			s, err := New(onThread)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}()
			f(t, s)
		})
	}
}

func eventfd(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func ring(t *testing.T, fd int) {
	t.Helper()
	if _, err := unix.Write(fd, one); err != nil {
		t.Fatal(err)
	}
}

func TestWaitTellsWhichCanBeRead(t *testing.T) {
	both(t, func(t *testing.T, s *Set) {
		a, b := eventfd(t), eventfd(t)
		if err := errors.Join(s.Add(a, 3, true), s.Add(b, 5, false)); err != nil {
			t.Fatal(err)
		}
		var tags [4]int
		want := func(want ...int) {
			t.Helper()
			n, err := s.Wait(tags[:], time.Now().Add(20*time.Millisecond))
			if len(want) == 0 && !errors.Is(err, os.ErrDeadlineExceeded) || len(want) > 0 && err != nil || n != len(want) {
				t.Fatalf("%d: %v, %v; want %v", n, tags[:n], err, want)
			}
			for i := range want {
				if tags[i] != want[i] {
					t.Fatalf("%v, want %v", tags[:n], want)
				}
			}
		}
		want()
		ring(t, a)
		want(3)
		want() // an edge is reported once
		ring(t, b)
		want(5)
		want(5)
		var v [8]byte
		unix.Read(b, v[:])
		want()
		if err := s.Remove(a); err != nil {
			t.Fatal(err)
		}
		ring(t, a)
		want()
	})
}

func TestWakeCountsOnce(t *testing.T) {
	both(t, func(t *testing.T, s *Set) {
		var tags [1]int
		for range 100 {
			go s.Wake()
			if n, err := s.Wait(tags[:], time.Now().Add(limit)); n != 0 || err != nil {
				t.Fatal(n, err)
			}
		}
		s.Wake()
		if n, err := s.Poll(tags[:]); n != 0 || err != nil {
			t.Fatal(n, err)
		}
		if _, err := s.Wait(tags[:], time.Now().Add(limit)); err != nil {
			t.Fatal("Poll ate the Wake:", err)
		}
		if _, err := s.Wait(tags[:], time.Now().Add(time.Millisecond)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
	})
}

func TestCloseEndsWait(t *testing.T) {
	both(t, func(t *testing.T, s *Set) {
		done := make(chan error, 1)
		go func() {
			_, err := s.Wait(make([]int, 1), time.Time{})
			done <- err
		}()
		time.Sleep(5 * time.Millisecond)
		s.Close()
		select {
		case err := <-done:
			if !errors.Is(err, net.ErrClosed) {
				t.Fatal(err)
			}
		case <-time.After(limit):
			t.Fatal("Wait goes on")
		}
		s.Wake()
		if _, err := s.Poll(make([]int, 1)); !errors.Is(err, net.ErrClosed) {
			t.Fatal(err)
		}
		if err := s.Add(0, 1, true); !errors.Is(err, net.ErrClosed) {
			t.Fatal(err)
		}
	})
}

func TestWaitDoesNotAllocate(t *testing.T) {
	both(t, func(t *testing.T, s *Set) {
		fd := eventfd(t)
		if err := s.Add(fd, 1, true); err != nil {
			t.Fatal(err)
		}
		var tags [4]int
		deadline := time.Now().Add(limit)
		if n := testing.AllocsPerRun(100, func() {
			ring(t, fd)
			if n, err := s.Wait(tags[:], deadline); n != 1 || err != nil {
				t.Fatal(n, err)
			}
		}); n != 0 {
			t.Errorf("%v allocations", n)
		}
	})
}
