/* Counts the file operations of a process, and at one of them kills, signals or fails it.

   Loaded by LD_PRELOAD, it stands before the C library's functions. It is armed by `storm_arm` (through ctypes, in a
   process that was forked) or by the environment (in one that was started); only the armed process counts, not the
   children that it starts. Plans are a comma-separated list of

       NUMBER:ACTION:VALUE

   NUMBER counts from 1; 0 plans nothing and only counts. ACTION is one of

       kill     SIGKILL before the operation; VALUE 1: within it (half of a write); VALUE 2: after it
       signal   the signal VALUE before the operation
       group    the same to the whole process group, as a terminal's Ctrl-C, before the operation
       fail     from here on every changing operation fails with the errno VALUE, a write after half of its bytes

   With a log file each operation is a line of it: its number, its name, its path or descriptor. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { KILL, SIGNAL, GROUP, FAIL };
enum { MAX_PLANS = 8 };

static struct { long number; enum action action; int value; } plans[MAX_PLANS];
static int count_of_plans, log_descriptor = -1, failing, kill_after;
static pid_t armed;
static long operations;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);
    if (!found)
        abort();
    return found;
}

/* Returns how many operations there were. */
long storm_operations(void) { return operations; }

/* Takes plans as above; an empty text disarms. */
void storm_arm(const char *text, const char *log)
{
    armed = 0;
    operations = failing = kill_after = count_of_plans = 0;
    log_descriptor = -1;
    if (!*text)
        return;
    for (char *copy = strdup(text), *rest = copy, *word; (word = strsep(&rest, ",")) && count_of_plans < MAX_PLANS;) {
        char action[16] = "";
        long number = 0;
        int value = 0;
        if (sscanf(word, "%ld:%15[a-z]:%d", &number, action, &value) < 2)
            abort();
        plans[count_of_plans].number = number;
        plans[count_of_plans].action = *action == 'k'   ? KILL
                                         : *action == 's' ? SIGNAL
                                         : *action == 'g' ? GROUP
                                                          : FAIL;
        plans[count_of_plans++].value = value;
    }
    if (log && *log)
        log_descriptor = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    armed = getpid();
}

__attribute__((constructor)) static void arm_from_environment(void)
{
    const char *text = getenv("STORM_PLANS");
    if (text)
        storm_arm(text, getenv("STORM_LOG"));
    unsetenv("STORM_PLANS"); /* not for the processes that this one starts */
    unsetenv("STORM_LOG");
}

static void note(const char *name, const char *what, int descriptor)
{
    char line[512];
    int length = snprintf(line, sizeof line, "%ld %s %.400s", operations, name, what ? what : "");
    if (!what)
        length += snprintf(line + length, sizeof line - length, "%d", descriptor);
    line[length++] = '\n';
    if (syscall(SYS_write, log_descriptor, line, length) < 0)
        abort();
}

/* Counts an operation and does what is planned for it before it happens. Returns 0, or the errno to fail with;
   *half is set where a write is to be cut there. */
static int before(const char *name, const char *path, int descriptor, int changes, int *half)
{
    if (!armed || armed != getpid())
        return 0;
    operations++;
    kill_after = 0;
    if (log_descriptor >= 0)
        note(name, path, descriptor);
    for (int i = 0; i < count_of_plans; i++) {
        if (plans[i].number != operations)
            continue;
        if (plans[i].action == FAIL)
            failing = plans[i].value, *half = 1;
        else if (plans[i].action == SIGNAL)
            raise(plans[i].value);
        else if (plans[i].action == GROUP)
            kill(0, plans[i].value);
        else if (plans[i].value == 0)
            kill(armed, SIGKILL);
        else
            kill_after = 1, *half = plans[i].value == 1;
    }
    return changes ? failing : 0;
}

static void after(void)
{
    if (kill_after && armed == getpid())
        kill(armed, SIGKILL);
}

/* A function of one operation: what is planned before it, the operation unless it is to fail, a kill after it. */
#define AROUND(name, path, descriptor, changes, call)                                                                  \
    do {                                                                                                               \
        int half = 0, error = before(#name, path, descriptor, changes, &half);                                        \
        if (error) {                                                                                                   \
            errno = error;                                                                                             \
            return -1;                                                                                                 \
        }                                                                                                              \
        __typeof__(call) result = call;                                                                                \
        int kept = errno;                                                                                              \
        after();                                                                                                       \
        errno = kept;                                                                                                  \
        return result;                                                                                                 \
    } while (0)

/* Devices are on no disk that could be full. */
static int opens_to_change(const char *path, int flags)
{
    return (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) && strncmp(path, "/dev/", 5) && strncmp(path, "/proc/", 6);
}

static int is_file(int descriptor)
{
    struct stat found;
    return !fstat(descriptor, &found) && S_ISREG(found.st_mode);
}

#define MODE(flags, last)                                                                                              \
    mode_t mode = 0;                                                                                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                               \
        va_list list;                                                                                                  \
        va_start(list, last);                                                                                          \
        mode = va_arg(list, mode_t);                                                                                   \
        va_end(list);                                                                                                  \
    }

int open(const char *path, int flags, ...)
{
    MODE(flags, flags)
    AROUND(open, path, -1, opens_to_change(path, flags), REAL(open)(path, flags, mode));
}

int open64(const char *path, int flags, ...)
{
    MODE(flags, flags)
    AROUND(open64, path, -1, opens_to_change(path, flags), REAL(open64)(path, flags, mode));
}

int openat(int folder, const char *path, int flags, ...)
{
    MODE(flags, flags)
    AROUND(openat, path, -1, opens_to_change(path, flags), REAL(openat)(folder, path, flags, mode));
}

int openat64(int folder, const char *path, int flags, ...)
{
    MODE(flags, flags)
    AROUND(openat64, path, -1, opens_to_change(path, flags), REAL(openat64)(folder, path, flags, mode));
}

static FILE *open_stream(const char *name, const char *path, const char *mode)
{
    int half = 0, flags = *mode == 'r' && !strchr(mode, '+') ? O_RDONLY : O_WRONLY;
    int error = before(name, path, -1, opens_to_change(path, flags), &half);
    if (error) {
        errno = error;
        return NULL;
    }
    FILE *result = ((FILE * (*)(const char *, const char *)) real(name))(path, mode);
    int kept = errno;
    after();
    errno = kept;
    return result;
}

FILE *fopen(const char *path, const char *mode) { return open_stream("fopen", path, mode); }
FILE *fopen64(const char *path, const char *mode) { return open_stream("fopen64", path, mode); }

/* A write to a terminal or a pipe is an operation too, but no full disk. */
ssize_t write(int descriptor, const void *data, size_t size)
{
    int half = 0, error = before("write", NULL, descriptor, is_file(descriptor), &half);
    if (half && size > 1 && is_file(descriptor)) {
        ssize_t wrote = REAL(write)(descriptor, data, size / 2);
        after();
        return wrote;
    }
    if (error) {
        errno = error;
        return -1;
    }
    ssize_t wrote = REAL(write)(descriptor, data, size);
    int kept = errno;
    after();
    errno = kept;
    return wrote;
}

ssize_t writev(int descriptor, const struct iovec *parts, int count)
{
    AROUND(writev, NULL, descriptor, is_file(descriptor), REAL(writev)(descriptor, parts, count));
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset)
{
    AROUND(pwrite64, NULL, descriptor, 1, REAL(pwrite64)(descriptor, data, size, offset));
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t size);
ssize_t sendfile64(int out, int in, off64_t *offset, size_t size)
{
    AROUND(sendfile64, NULL, out, is_file(out), REAL(sendfile64)(out, in, offset, size));
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags)
{
    AROUND(copy_file_range, NULL, out, 1, REAL(copy_file_range)(in, from, out, to, size, flags));
}

int ftruncate64(int descriptor, off64_t size)
{
    AROUND(ftruncate64, NULL, descriptor, 1, REAL(ftruncate64)(descriptor, size));
}

int posix_fallocate64(int descriptor, off64_t offset, off64_t size)
{
    int half = 0, error = before("posix_fallocate64", NULL, descriptor, 1, &half);
    if (error)
        return error; /* not through errno */
    int result = REAL(posix_fallocate64)(descriptor, offset, size);
    after();
    return result;
}

int fsync(int descriptor) { AROUND(fsync, NULL, descriptor, 0, REAL(fsync)(descriptor)); }
int fdatasync(int descriptor) { AROUND(fdatasync, NULL, descriptor, 0, REAL(fdatasync)(descriptor)); }
int flock(int descriptor, int how) { AROUND(flock, NULL, descriptor, 0, REAL(flock)(descriptor, how)); }
int mkdir(const char *path, mode_t mode) { AROUND(mkdir, path, -1, 1, REAL(mkdir)(path, mode)); }
int rmdir(const char *path) { AROUND(rmdir, path, -1, 0, REAL(rmdir)(path)); }
int unlink(const char *path) { AROUND(unlink, path, -1, 0, REAL(unlink)(path)); }
int unlinkat(int folder, const char *path, int flags)
{
    AROUND(unlinkat, path, -1, 0, REAL(unlinkat)(folder, path, flags));
}
int rename(const char *from, const char *to) { AROUND(rename, to, -1, 1, REAL(rename)(from, to)); }
int link(const char *from, const char *to) { AROUND(link, to, -1, 1, REAL(link)(from, to)); }
int symlink(const char *from, const char *to) { AROUND(symlink, to, -1, 1, REAL(symlink)(from, to)); }
int chmod(const char *path, mode_t mode) { AROUND(chmod, path, -1, 0, REAL(chmod)(path, mode)); }
