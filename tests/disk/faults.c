/* Faults of a disk, under everything that a process does to files: preloaded, it counts the operations below one folder
 * over a process and its forks, and makes the chosen one fail. Built and driven by tests/disk/faults.py. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { COUNT, FAIL, FAIL_FROM_HERE, SHORT, KILL_BEFORE, KILL_AFTER };

struct state { /* shared with all forks */
    atomic_long seen;
    long at;
    int mode, error;
    char hit[PATH_MAX + 64]; /* what was hit: "operation path" */
    atomic_long told;
    long room;
    char log[]; /* every operation, one a line, while counting */
};

static struct state *state;
static char root[PATH_MAX];
static _Atomic(char *) held[4096]; /* the path of each open descriptor below the root */
static char written[4096]; /* whether it is open for writing */
static int backwards;

void faults_setup(const char *folder, long log_bytes) {
    state = mmap(NULL, sizeof *state + log_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    state->room = log_bytes;
    snprintf(root, sizeof root, "%s/", folder);
}

void faults_arm(long at, int mode, int error) {
    atomic_store(&state->told, 0);
    atomic_store(&state->seen, 0);
    state->hit[0] = 0;
    state->at = at, state->mode = mode, state->error = error;
}

long faults_seen(void) { return atomic_load(&state->seen); }
const char *faults_hit(void) { return state->hit; }
const char *faults_log(void) { return state->log; }

/* A process that is not driven by faults.py is told by its environment: FAULTS="ROOT AT MODE ERROR", CLOCK=back. */
__attribute__((constructor)) static void from_environment(void) {
    char folder[PATH_MAX];
    long at;
    int mode, error;
    const char *wanted = getenv("FAULTS"), *clock = getenv("CLOCK");
    backwards = clock && strcmp(clock, "back") == 0;
    if (wanted && sscanf(wanted, "%4095s %ld %d %d", folder, &at, &mode, &error) == 4) {
        faults_setup(folder, 0);
        faults_arm(at, mode, error);
    }
}

static int below(const char *path) { return state && path && strncmp(path, root, strlen(root)) == 0; }
static const char *path_of(int fd) { return fd >= 0 && fd < 4096 ? held[fd] : NULL; }

static const char *path_at(int folder, const char *name, char *room) {
    if (!state || !name || name[0] == '/' || folder == AT_FDCWD) return below(name) ? name : NULL;
    if (!path_of(folder)) return NULL;
    if (!name[0]) return path_of(folder);
    snprintf(room, PATH_MAX, "%s/%s", path_of(folder), name);
    return room;
}

enum { GO, ERROR, HALF, GO_AND_DIE };
enum change { READS, REMOVES, ROOM, BYTES }; /* ROOM: needs some of the disk; BYTES: may write fewer than asked */

/* What is to become of this operation. */
static int decide(const char *operation, const char *path, enum change changes) {
    if (!path) return GO;
    long now = atomic_fetch_add(&state->seen, 1) + 1;
    if (state->mode == COUNT) {
        char line[PATH_MAX + 64];
        long size = snprintf(line, sizeof line, "%d %s %s\n", changes, operation, path + strlen(root));
        long start = atomic_fetch_add(&state->told, size);
        if (start + size < state->room) memcpy(state->log + start, line, size);
        return GO;
    }
    if (now < state->at || (now > state->at && state->mode != FAIL_FROM_HERE)) return GO;
    if (now == state->at) snprintf(state->hit, sizeof state->hit, "%s %s", operation, path + strlen(root));
    switch (state->mode) {
        case KILL_BEFORE: kill(getpid(), SIGKILL); /* falls through */
        case KILL_AFTER: return GO_AND_DIE;
        case SHORT: return changes == BYTES ? HALF : GO;
        case FAIL_FROM_HERE:
            if (changes < ROOM) return GO; /* a full disk still reads and removes */
            if (now == state->at && changes == BYTES) return HALF;
    }
    errno = state->error;
    return ERROR;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define AFTER(fate, result) do { if ((fate) == GO_AND_DIE) kill(getpid(), SIGKILL); return (result); } while (0)

#define OPERATION(type, bad, name, parameters, arguments, path, changes)                                            \
    type name parameters {                                                                                          \
        REAL(name);                                                                                                 \
        char room[PATH_MAX]; (void)room;                                                                            \
        int fate = decide(#name, path, changes);                                                                     \
        if (fate == ERROR) return bad;                                                                              \
        type result = real arguments;                                                                               \
        AFTER(fate, result);                                                                                        \
    }

static int opened(int fd, const char *path, int flags) {
    if (fd >= 0 && fd < 4096 && path) {
        held[fd] = strdup(path);
        written[fd] = (flags & O_ACCMODE) != O_RDONLY;
    }
    return fd;
}

#define OPENER(name, parameters, arguments, path)                                                                   \
    int name parameters {                                                                                           \
        REAL(name);                                                                                                 \
        char room[PATH_MAX]; (void)room;                                                                            \
        va_list rest; va_start(rest, flags);                                                                        \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; va_end(rest);                             \
        const char *where = path;                                                                                   \
        int fate = decide(flags & O_CREAT ? #name "-new" : #name, where, flags & O_CREAT ? ROOM : READS);                  \
        if (fate == ERROR) return -1;                                                                               \
        int fd = opened(real arguments, where, flags);                                                                     \
        AFTER(fate, fd);                                                                                            \
    }

OPENER(open, (const char *name_, int flags, ...), (name_, flags, mode), path_at(AT_FDCWD, name_, room))
OPENER(open64, (const char *name_, int flags, ...), (name_, flags, mode), path_at(AT_FDCWD, name_, room))
OPENER(openat, (int at, const char *name_, int flags, ...), (at, name_, flags, mode), path_at(at, name_, room))
OPENER(openat64, (int at, const char *name_, int flags, ...), (at, name_, flags, mode), path_at(at, name_, room))

int close(int fd) {
    REAL(close);
    char *path = fd >= 0 && fd < 4096 ? atomic_exchange(&held[fd], NULL) : NULL;
    int fate = path && written[fd] ? decide("close", path, ROOM) : GO;
    int error = errno;
    free(path);
    int result = real(fd); /* like Linux: the descriptor is gone, also when close tells of an error */
    if (fate == ERROR) { errno = error; return -1; }
    AFTER(fate, result);
}

#define WRITER(type, name, parameters, arguments, half)                                                             \
    type name parameters {                                                                                          \
        REAL(name);                                                                                                 \
        int fate = decide(#name, path_of(fd), BYTES);                                                                   \
        if (fate == ERROR) return -1;                                                                               \
        if (fate == HALF) half;                                                                                     \
        type result = real arguments;                                                                               \
        AFTER(fate, result);                                                                                        \
    }
#define HALVE if (size > 1) size /= 2

WRITER(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size), HALVE)
WRITER(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), HALVE)
WRITER(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at), HALVE)
WRITER(ssize_t, writev, (int fd, const struct iovec *parts, int size), (fd, parts, size), HALVE)
WRITER(ssize_t, sendfile, (int fd, int from, off_t *at, size_t size), (fd, from, at, size), HALVE)
WRITER(ssize_t, sendfile64, (int fd, int from, off64_t *at, size_t size), (fd, from, at, size), HALVE)
WRITER(ssize_t, copy_file_range, (int from, off64_t *at, int fd, off64_t *to, size_t size, unsigned flags),
       (from, at, fd, to, size, flags), HALVE)

OPERATION(ssize_t, -1, read, (int fd, void *data, size_t size), (fd, data, size), path_of(fd), READS)
OPERATION(ssize_t, -1, pread, (int fd, void *data, size_t size, off_t at), (fd, data, size, at), path_of(fd), READS)
OPERATION(ssize_t, -1, pread64, (int fd, void *data, size_t size, off64_t at), (fd, data, size, at), path_of(fd), READS)
OPERATION(ssize_t, -1, readv, (int fd, const struct iovec *parts, int size), (fd, parts, size), path_of(fd), READS)
OPERATION(int, -1, fsync, (int fd), (fd), path_of(fd), ROOM)
OPERATION(int, -1, fdatasync, (int fd), (fd), path_of(fd), ROOM)
OPERATION(int, -1, ftruncate, (int fd, off_t size), (fd, size), path_of(fd), ROOM)
OPERATION(int, -1, ftruncate64, (int fd, off64_t size), (fd, size), path_of(fd), ROOM)
OPERATION(int, -1, fchmod, (int fd, mode_t mode), (fd, mode), path_of(fd), ROOM)
OPERATION(int, -1, rename, (const char *from, const char *to), (from, to), path_at(AT_FDCWD, from, room), ROOM)
OPERATION(int, -1, renameat, (int at, const char *from, int there, const char *to), (at, from, there, to), path_at(at, from, room), ROOM)
OPERATION(int, -1, link, (const char *from, const char *to), (from, to), path_at(AT_FDCWD, to, room), ROOM)
OPERATION(int, -1, linkat, (int at, const char *from, int there, const char *to, int flags), (at, from, there, to, flags),
          path_at(there, to, room), ROOM)
OPERATION(int, -1, symlink, (const char *from, const char *to), (from, to), path_at(AT_FDCWD, to, room), ROOM)
OPERATION(int, -1, mkdir, (const char *name_, mode_t mode), (name_, mode), path_at(AT_FDCWD, name_, room), ROOM)
OPERATION(int, -1, mkdirat, (int at, const char *name_, mode_t mode), (at, name_, mode), path_at(at, name_, room), ROOM)
OPERATION(int, -1, rmdir, (const char *name_), (name_), path_at(AT_FDCWD, name_, room), REMOVES)
OPERATION(int, -1, unlink, (const char *name_), (name_), path_at(AT_FDCWD, name_, room), REMOVES)
OPERATION(int, -1, unlinkat, (int at, const char *name_, int flags), (at, name_, flags), path_at(at, name_, room), REMOVES)
OPERATION(int, -1, chmod, (const char *name_, mode_t mode), (name_, mode), path_at(AT_FDCWD, name_, room), ROOM)
OPERATION(int, -1, fchmodat, (int at, const char *name_, mode_t mode, int flags), (at, name_, mode, flags), path_at(at, name_, room), ROOM)
OPERATION(DIR *, NULL, opendir, (const char *name_), (name_), path_at(AT_FDCWD, name_, room), READS)
OPERATION(DIR *, NULL, fdopendir, (int fd), (fd), path_of(fd), READS)
OPERATION(int, -1, stat, (const char *name_, struct stat *found), (name_, found), path_at(AT_FDCWD, name_, room), READS)
OPERATION(int, -1, lstat, (const char *name_, struct stat *found), (name_, found), path_at(AT_FDCWD, name_, room), READS)
OPERATION(int, -1, fstat, (int fd, struct stat *found), (fd, found), path_of(fd), READS)
OPERATION(int, -1, fstatat, (int at, const char *name_, struct stat *found, int flags), (at, name_, found, flags), path_at(at, name_, room), READS)
OPERATION(int, -1, stat64, (const char *name_, struct stat64 *found), (name_, found), path_at(AT_FDCWD, name_, room), READS)
OPERATION(int, -1, lstat64, (const char *name_, struct stat64 *found), (name_, found), path_at(AT_FDCWD, name_, room), READS)
OPERATION(int, -1, fstat64, (int fd, struct stat64 *found), (fd, found), path_of(fd), READS)
OPERATION(int, -1, statx, (int at, const char *restrict name_, int flags, unsigned mask, struct statx *restrict found),
          (at, name_, flags, mask, found), path_at(at, name_, room), READS)
OPERATION(void *, MAP_FAILED, mmap, (void *place, size_t size, int protection, int flags, int fd, off_t at),
          (place, size, protection, flags, fd, at), path_of(fd), READS)
OPERATION(void *, MAP_FAILED, mmap64, (void *place, size_t size, int protection, int flags, int fd, off64_t at),
          (place, size, protection, flags, fd, at), path_of(fd), READS)

/* A clock that goes back an hour each time it is asked. */
int clock_gettime(clockid_t clock, struct timespec *now) {
    static atomic_long hours;
    REAL(clock_gettime);
    int result = real(clock, now);
    if (backwards && clock == CLOCK_REALTIME) now->tv_sec -= 3600 * (++hours % 100000);
    return result;
}
