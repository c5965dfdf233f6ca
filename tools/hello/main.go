// Hello is an example of an appliance: a web page on a vif of its own. "barevif image" makes a guest
// of it, which has nothing else in it:
//
//	barevif image -o out ./tools/hello -- -addr 10.9.0.2/24
//	xl create out/xl.cfg
//
// With -emu it is a domain of "barevif host".
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/hypercall/xendev"
	"barevif/pvnet/netstack"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	addr := flag.String("addr", "10.9.0.2/24", "own `address`: IP/BITS")
	vif := flag.String("vif", "0", "`ID` of the vif")
	host := flag.String("emu", "", "`socket` of an emulated host; default: the Xen this runs on")
	flag.Parse()
	log.SetFlags(0)
	if err := serve(ctx, *addr, *vif, *host); err != nil {
		log.Fatal("hello: ", err)
	}
}

func serve(ctx context.Context, addr, vif, host string) error {
	prefix, err := netip.ParsePrefix(addr)
	if err != nil {
		return fmt.Errorf("-addr %q: not IP/BITS, such as 10.9.0.2/24", addr)
	}
	domain, err := open(ctx, host)
	if err != nil {
		return err
	}
	tcpip, err := netstack.Connect(ctx, domain, vif, netstack.Config{Addr: prefix})
	if err != nil {
		return err
	}
	defer tcpip.Close() // so that the backend sees the vif close
	l, err := tcpip.Listen("tcp", ":80")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: page(os.Args, os.Environ()), ReadHeaderTimeout: 10 * time.Second}
	context.AfterFunc(ctx, func() { server.Close() })
	log.Printf("hello: serving http://%v/", prefix.Addr())
	if err := server.Serve(l); ctx.Err() == nil {
		return err
	}
	log.Print("hello: asked to end")
	return nil
}

func open(ctx context.Context, host string) (hypercall.Domain, error) {
	if host != "" {
		return emu.Join(ctx, host, 1)
	}
	return xendev.Open(xendev.Config{})
}

// page shows what the program was started with.
func page(args, env []string) http.Handler {
	begun := time.Now()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		host, err := os.Hostname()
		if err != nil {
			host = err.Error()
		}
		fmt.Fprintf(w, "Hello from a Go program with a network card of its own.\n\nhost %s\nargs %q\nenv %q\nGo %s, process %d, serving for %v\n",
			host, args, env, runtime.Version(), os.Getpid(), time.Since(begun).Round(time.Second))
	})
	mux.HandleFunc("GET /memory", func(w http.ResponseWriter, _ *http.Request) { memory(w) })
	return mux
}

// memory serves the kernel's account of the guest's memory.
func memory(w http.ResponseWriter) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Write(b)
}
