/* Preloaded into a process: fails, or kills the process at, one file system call below a folder. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST 65536
static char folder[4096];
static char below[MOST];         /* whether a descriptor is of a file below the folder */
static const char *names[MOST];  /* of the calls, in their order */
static volatile long armed, count, at;
static int error_number;

/* Counts calls from now on. The call number n fails with the error; with 0 the process dies. */
void arm(const char *path, long n, int error) {
  snprintf(folder, sizeof folder, "%s", path);
  at = n, error_number = error, count = 0, armed = 1;
}

long disarm(void) {
  armed = 0;
  return count;
}

const char *name_of(long n) { return n > 0 && n < MOST && names[n] ? names[n] : ""; }

static int is_below(const char *path) { return path && !strncmp(path, folder, strlen(folder)); }

static int is_open(int fd) { return fd >= 0 && fd < MOST && below[fd]; }

static int at_below(int dir, const char *path) {
  return path && (path[0] == '/' ? is_below(path) : is_open(dir));
}

/* Whether this call is to fail. */
static int hit(const char *name, int concerns) {
  if (!armed || !concerns) return 0;
  long n = __sync_add_and_fetch(&count, 1);
  if (n < MOST) names[n] = name;
  if (n != at) return 0;
  if (!error_number) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  errno = error_number;
  return 1;
}

static int opened(int fd, int concerns) {
  if (fd >= 0 && fd < MOST) below[fd] = concerns;
  return fd;
}

#define NEXT(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))
#define MODE                                            \
  mode_t mode = 0;                                      \
  if (flags & (O_CREAT | __O_TMPFILE)) {                \
    va_list list;                                       \
    va_start(list, flags);                              \
    mode = va_arg(list, mode_t);                        \
    va_end(list);                                       \
  }
#define OPEN(name)                                      \
  int name(const char *path, int flags, ...) {          \
    MODE;                                               \
    int concerns = armed && is_below(path);             \
    if (hit("open", concerns)) return -1;               \
    return opened(NEXT(name)(path, flags, mode), concerns); \
  }
#define OPENAT(name)                                    \
  int name(int dir, const char *path, int flags, ...) { \
    MODE;                                               \
    int concerns = armed && at_below(dir, path);        \
    if (hit("open", concerns)) return -1;               \
    return opened(NEXT(name)(dir, path, flags, mode), concerns); \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define CALL(type, name, label, concerns, parameters, ...) \
  type name parameters {                                \
    if (hit(label, concerns)) return -1;                \
    return NEXT(name)(__VA_ARGS__);                     \
  }
CALL(int, mkdir, "mkdir", is_below(path), (const char *path, mode_t mode), path, mode)
CALL(int, mkdirat, "mkdir", at_below(dir, path), (int dir, const char *path, mode_t mode), dir, path, mode)
CALL(int, rename, "rename", is_below(from), (const char *from, const char *to), from, to)
CALL(int, renameat, "rename", at_below(a, from), (int a, const char *from, int b, const char *to), a, from, b, to)
CALL(int, unlink, "unlink", is_below(path), (const char *path), path)
CALL(int, unlinkat, "unlink", at_below(dir, path), (int dir, const char *path, int flags), dir, path, flags)
CALL(int, rmdir, "rmdir", is_below(path), (const char *path), path)
CALL(int, fsync, "fsync", is_open(fd), (int fd), fd)
CALL(int, fdatasync, "fsync", is_open(fd), (int fd), fd)
CALL(int, ftruncate, "truncate", is_open(fd), (int fd, off_t size), fd, size)
CALL(ssize_t, write, "write", is_open(fd), (int fd, const void *data, size_t size), fd, data, size)
CALL(ssize_t, writev, "write", is_open(fd), (int fd, const struct iovec *data, int size), fd, data, size)
CALL(ssize_t, pwrite, "write", is_open(fd), (int fd, const void *data, size_t size, off_t to), fd, data, size, to)
CALL(ssize_t, pwrite64, "write", is_open(fd), (int fd, const void *data, size_t size, off64_t to), fd, data, size, to)
CALL(ssize_t, read, "read", is_open(fd), (int fd, void *data, size_t size), fd, data, size)

DIR *opendir(const char *path) {
  if (hit("list", is_below(path))) return NULL;
  return NEXT(opendir)(path);
}

int close(int fd) {
  int concerns = armed && is_open(fd);
  if (fd >= 0 && fd < MOST) below[fd] = 0;
  int failed = hit("close", concerns), result = NEXT(close)(fd);
  if (failed) errno = error_number;
  return failed ? -1 : result;
}
