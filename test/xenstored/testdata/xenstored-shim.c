/*
 * Lets Debian's xenstored run where there is no Xen: preloaded, it stands in for
 * the calls the daemon makes to the hypervisor's libraries. A domain is a set of
 * files in $SHIM_DIR:
 *
 *   ring.<dom>   its xenstore ring, one page; a domain without it does not exist
 *   doorbell     FIFO: four bytes, a port number, wake the daemon for that port
 *   port.<n>     FIFO: gets a byte when the daemon notifies port n
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PORTS 1024
#define DOM_EXC_PORT (PORTS - 1)

static char handle;		/* what an opened library handle points to */
static int doorbell = -1;
static int bell[PORTS];		/* descriptor + 1 of port.<n> */

static int real_open(const char *file, int flags)
{
	int (*next)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");

	return next(file, flags);
}

static const char *in_dir(char *buf, size_t len, const char *format, unsigned n)
{
	int used = snprintf(buf, len, "%s/", getenv("SHIM_DIR"));

	snprintf(buf + used, len - used, format, n);
	return buf;
}

static int open_fifo(const char *format, unsigned n)
{
	char buf[512];

	in_dir(buf, sizeof(buf), format, n);
	mkfifo(buf, 0600);
	return real_open(buf, O_RDWR | O_NONBLOCK);
}

static int with_content(const char *name, const void *content, size_t len)
{
	int fd = memfd_create(name, 0);

	if (fd < 0 || write(fd, content, len) != (ssize_t)len || lseek(fd, 0, SEEK_SET))
		abort();
	return fd;
}

/* The daemon finds domain 0's own ring through two files of xenfs. */
static int xenfs(const char *file)
{
	static const char page[4096];

	if (strstr(file, "/xsd_kva"))
		return with_content("xsd_kva", page, sizeof(page));
	if (strstr(file, "/xsd_port"))
		return with_content("xsd_port", "1", 1);
	return -1;
}

#define INTERPOSE_OPEN(name)						\
int name(const char *file, int flags, ...)				\
{									\
	int (*next)(const char *, int, ...) = dlsym(RTLD_NEXT, #name);	\
	int fd = xenfs(file);						\
	va_list ap;							\
	mode_t mode = 0;						\
									\
	if (fd >= 0)							\
		return fd;						\
	if (flags & O_CREAT) {						\
		va_start(ap, flags);					\
		mode = va_arg(ap, mode_t);				\
		va_end(ap);						\
	}								\
	return next(file, flags, mode);					\
}
INTERPOSE_OPEN(open)
INTERPOSE_OPEN(open64)

void *xenevtchn_open(void *logger, unsigned flags)
{
	doorbell = open_fifo("doorbell", 0);
	return &handle;
}

void *xenevtchn_fdopen(void *logger, int fd, unsigned flags)
{
	return xenevtchn_open(logger, flags);
}

int xenevtchn_fd(void *h)
{
	return doorbell;
}

int xenevtchn_bind_interdomain(void *h, uint32_t dom, uint32_t port)
{
	if (port >= PORTS) {
		errno = EINVAL;
		return -1;
	}
	if (!bell[port])
		bell[port] = open_fifo("port.%u", port) + 1;
	return port;
}

int xenevtchn_bind_virq(void *h, unsigned virq)
{
	return DOM_EXC_PORT;
}

int xenevtchn_pending(void *h)
{
	uint32_t port;

	if (read(doorbell, &port, sizeof(port)) != sizeof(port)) {
		errno = EAGAIN;
		return -1;
	}
	return port;
}

int xenevtchn_unmask(void *h, uint32_t port)
{
	return 0;
}

int xenevtchn_unbind(void *h, uint32_t port)
{
	return 0;
}

int xenevtchn_notify(void *h, uint32_t port)
{
	/* A full FIFO already says what one more byte would. */
	if (port < PORTS && bell[port])
		(void)!write(bell[port] - 1, "", 1);
	return 0;
}

void *xengnttab_open(void *logger, unsigned flags)
{
	return &handle;
}

int xengnttab_close(void *h)
{
	return 0;
}

int xengnttab_set_max_grants(void *h, uint32_t count)
{
	return 0;
}

void *xengnttab_map_grant_ref(void *h, uint32_t dom, uint32_t ref, int prot)
{
	char buf[512];
	void *page;
	int fd = real_open(in_dir(buf, sizeof(buf), "ring.%u", dom), O_RDWR);

	if (fd < 0)
		return NULL;
	page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	return page == MAP_FAILED ? NULL : page;
}

int xengnttab_unmap(void *h, void *page, uint32_t count)
{
	return munmap(page, (size_t)count * 4096);
}

void *xc_interface_open(void *logger, void *dombuild, unsigned flags)
{
	return &handle;
}

int xc_interface_close(void *h)
{
	return 0;
}

/* The record begins with the domain's number; all else may be zero. */
int xc_domain_getinfo(void *h, uint32_t dom, unsigned max, void *info)
{
	char buf[512];

	memset(info, 0, 64);
	if (dom && access(in_dir(buf, sizeof(buf), "ring.%u", dom), F_OK))
		return 0;
	*(uint32_t *)info = dom;
	return 1;
}
