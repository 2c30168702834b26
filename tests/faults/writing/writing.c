/* Preloaded: write(), writev() and pwrite() below one folder fail once, after so many that work. Python's own
 * writes and those of native code, which no audit hook sees, come through here. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static long left = -1; /* never */
static int code, met;

void writing_arm(const char *below, long works, int error) {
    snprintf(folder, sizeof folder, "%s", below);
    code = error;
    met = 0;
    left = works;
}

int writing_met(void) { return met; }

static int fails(int descriptor) {
    char link[64], path[4096];
    if (left < 0)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0 || strncmp(path, folder, strlen(folder)) || length < (ssize_t)strlen(folder))
        return 0;
    if (left-- > 0)
        return 0;
    met = 1; /* left is -1 now */
    errno = code;
    return 1;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) \
    real = dlsym(RTLD_NEXT, #name)

ssize_t write(int descriptor, const void *data, size_t size) {
    REAL(write);
    return fails(descriptor) ? -1 : real(descriptor, data, size);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(writev);
    return fails(descriptor) ? -1 : real(descriptor, parts, count);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    return fails(descriptor) ? -1 : real(descriptor, data, size, at);
}
