/* LD_PRELOAD shim: run a stock Debian 4.17 xenstored with no Xen. Lab aid, own work.
   FAKE_DIR/ring.domN = shared 4 KiB ring of fake domain N; FAKE_DIR/evtchn0 = FIFO: write the 4-byte port to
   kick xenstored; FAKE_DIR/to_dom_portP = FIFO that gets one byte when xenstored notifies port P. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
typedef int (*open_fn)(const char *, int, ...);
static int ropen(const char *p, int fl) { return ((open_fn)dlsym(RTLD_NEXT, "open"))(p, fl); }
static void path(char *b, const char *k, unsigned n) { snprintf(b, 256, "%s/%s%u", getenv("FAKE_DIR"), k, n); }
static int fifo(const char *k, unsigned n) { char b[256]; path(b, k, n); mkfifo(b, 0600); return ropen(b, O_RDWR | O_NONBLOCK); }
static int special(const char *p) {          /* the two /proc/xen files dom0 set-up wants */
  int f;
  if (strstr(p, "xsd_kva")) { f = memfd_create("kva", 0); if (ftruncate(f, 4096)) abort(); return f; }
  if (strstr(p, "xsd_port")) { f = memfd_create("port", 0); if (write(f, "1", 1) != 1) abort(); lseek(f, 0, 0); return f; }
  return -2;
}
#define OPEN(name) int name(const char *p, int fl, ...) { int r = special(p); if (r != -2) return r; \
  va_list a; va_start(a, fl); int m = va_arg(a, int); va_end(a); return ((open_fn)dlsym(RTLD_NEXT, #name))(p, fl, m); }
OPEN(open) OPEN(open64)
static int efd = -1, nf[64]; static char h[64];
void *xenevtchn_open(void *l, unsigned f) { efd = fifo("evtchn", 0); return h; }
void *xenevtchn_fdopen(void *l, int fd, unsigned f) { efd = fifo("evtchn", 0); return h; }
int xenevtchn_fd(void *x) { return efd; }
int xenevtchn_bind_interdomain(void *x, unsigned d, unsigned p) { if (p < 64 && !nf[p]) nf[p] = fifo("to_dom_port", p); return p; }
int xenevtchn_bind_virq(void *x, unsigned v) { return 63; }
int xenevtchn_pending(void *x) { int p; if (read(efd, &p, 4) != 4) { errno = EAGAIN; return -1; } return p; }
int xenevtchn_unmask(void *x, unsigned p) { return 0; }
int xenevtchn_unbind(void *x, unsigned p) { return 0; }
int xenevtchn_notify(void *x, unsigned p) { if (p < 64 && nf[p] > 0 && write(nf[p], "!", 1) != 1) {} return 0; }
void *xengnttab_open(void *l, unsigned f) { return h; }
int xengnttab_close(void *x) { return 0; }
int xengnttab_set_max_grants(void *x, unsigned n) { return 0; }
void *xengnttab_map_grant_ref(void *x, unsigned d, unsigned r, int p) {
  char b[256]; path(b, "ring.dom", d); int f = ropen(b, O_RDWR); if (f < 0) return 0;
  void *m = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, f, 0); close(f); return m == MAP_FAILED ? 0 : m; }
int xengnttab_unmap(void *x, void *a, unsigned n) { return munmap(a, 4096); }
void *xc_interface_open(void *a, void *b, unsigned c) { return h; }
int xc_interface_close(void *x) { return 0; }
int xc_domain_getinfo(void *x, unsigned dom, unsigned n, void *info) {   /* first field of the record = domid */
  char b[256]; path(b, "ring.dom", dom); memset(info, 0, 64); if (dom && access(b, F_OK)) return 0; *(unsigned *)info = dom; return 1; }
