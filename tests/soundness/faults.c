/* SPDX-License-Identifier: MIT
 *
 * Preloaded into a process, it kills the process or fails a call at the k-th call that changes the
 * file system below a folder: open for writing, write, fsync, rename, unlink, mkdir, chmod.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum Mode { COUNT, KILL_BEFORE, KILL_AFTER, FAIL_ONCE, FAIL_EVER_AFTER };

static char folder[PATH_MAX];
static long calls, point;
static int mode, failure;

void faults_arm(const char* path, long at, int how, int error) {
  snprintf(folder, sizeof folder, "%s", path);
  calls = 0;
  point = at;
  mode = how;
  failure = error;
}

long faults_calls(void) { return calls; }

static int below(const char* path) { return folder[0] && !strncmp(path, folder, strlen(folder)); }

static int open_below(int file) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = folder[0] ? readlink(link, path, sizeof path - 1) : -1;
  if (size < 0) return 0;
  path[size] = 0;
  return below(path);
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/* Whether the call is to fail. A full or read-only disk still lets files be removed if it is full. */
static int strike(int removal) {
  ++calls;
  if (mode == KILL_BEFORE && calls == point) die();
  int fails = (mode == FAIL_ONCE && calls == point) ||
              (mode == FAIL_EVER_AFTER && calls >= point && (!removal || failure == EROFS));
  if (fails) errno = failure;
  return fails;
}

static void survived(void) {
  if (mode == KILL_AFTER && calls == point) die();
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define STRUCK(condition, removal, call) \
  int inside = (condition);              \
  if (inside && strike(removal)) return -1; \
  int result = (call);                   \
  if (inside) survived();                \
  return result

#define OPEN(name)                                                        \
  int name(const char* path, int flags, ...) {                            \
    va_list list;                                                         \
    va_start(list, flags);                                                \
    mode_t bits = va_arg(list, mode_t);                                   \
    va_end(list);                                                         \
    STRUCK((flags & O_ACCMODE) != O_RDONLY && below(path), 0, REAL(name)(path, flags, bits)); \
  }
OPEN(open)
OPEN(open64)

int fsync(int file) { STRUCK(open_below(file), 0, REAL(fsync)(file)); }
int rename(const char* from, const char* to) { STRUCK(below(to), 0, REAL(rename)(from, to)); }
int unlink(const char* path) { STRUCK(below(path), 1, REAL(unlink)(path)); }
int mkdir(const char* path, mode_t bits) { STRUCK(below(path), 0, REAL(mkdir)(path, bits)); }
int chmod(const char* path, mode_t bits) { STRUCK(below(path), 0, REAL(chmod)(path, bits)); }

/* Half is written before the process dies or the disk is full. */
ssize_t write(int file, const void* data, size_t size) {
  if (!open_below(file)) return REAL(write)(file, data, size);
  if (mode == FAIL_EVER_AFTER && calls + 1 == point && size > 1) {
    ++calls;
    return REAL(write)(file, data, size / 2);
  }
  if (strike(0)) return -1;
  int torn = mode == KILL_AFTER && calls == point;
  ssize_t result = REAL(write)(file, data, torn ? size / 2 : size);
  survived();
  return result;
}
