/* A libcuda.so.1 without a GPU: the checkpoint calls on states kept in files beside the library.
 *
 * DIR is the directory that the library was loaded from. DIR/procs/PID holds the state (0 running,
 * 1 locked, 2 checkpointed, 3 failed); no file means: not a CUDA process. DIR/version overrides the
 * driver's version. DIR/log gets a line "CALL PID" as each call begins.
 *
 * DIR/faults/CALL or DIR/faults/CALL.PID is a fault to order:
 *   fail CODE          return CODE, state unchanged
 *   fail CODE STATE    return CODE, state set to STATE
 *   hang               block until the FIFO beside it (FAULT.fifo) is opened and closed, then continue
 *   die                the calling process ends at once
 *   lie                return 0, change nothing
 *
 * DIR/modes/PID or DIR/modes/all, a word: what real drivers do (facts with the number of the report)
 *   cuinit_only        cuInit without a context: there is a restore thread, lock says NOT_INITIALIZED
 *   nvml_only          asked NVML and nothing else: no restore thread
 *   final_oom          the first restore runs out of memory, for good: then restore says
 *                      OPERATING_SYSTEM (304) and unlock ILLEGAL_STATE (cuda-checkpoint#44)
 *   lock_kills         the lock kills its process and says 304 (cuda-checkpoint#58)
 *   one_at_a_time      any call waits while another process is locked (cuda-checkpoint#30)
 *   busy               the state is CHECKPOINTING (4) or RESTORING (5), CUDA 13.4, until asked again
 *   forgets            bytes on the GPU are zero after a restore
 *
 * DIR/gpus overrides how many GPUs there are (1). A process that makes a context on one is a CUDA
 * process from then on; its memory there is its own (contexts.c).
 *
 * DIR/restored/PID: restored and running. Such a process must be suspended again before it ends, or
 * the host hangs (seen with 580): DIR/host_hung gets a line "PID" then.
 *
 * DIR/hook, when it is there and executable, is run as "hook checkpoint PID" and "hook restore PID"
 * before the state changes: it moves the memory. When it fails the call returns OUT_OF_MEMORY (2).
 *
 * The rules are those of the driver API (cuda.h 12.8): wrong state is ILLEGAL_STATE (401), unknown
 * process INVALID_VALUE (1), no cuInit before NOT_INITIALIZED (3).
 */
#define _GNU_SOURCE
#include "libcuda.h"
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>


int initialised;

void path_of(char *out, const char *format, ...)
{
	Dl_info info;
	char rest[256];
	va_list list;
	char *slash;

	if (!dladdr((void *)path_of, &info)) abort();
	snprintf(out, PATH_MAX, "%s", info.dli_fname);
	slash = strrchr(out, '/');
	if (!slash) abort();
	va_start(list, format);
	vsnprintf(rest, sizeof rest, format, list);
	va_end(list);
	snprintf(slash + 1, PATH_MAX - (slash + 1 - out), "%s", rest);
}

int read_line(const char *path, char *out, size_t size)
{
	FILE *file = fopen(path, "re");

	if (!file) return -1;
	if (!fgets(out, (int)size, file)) out[0] = 0;
	fclose(file);
	return 0;
}

int get_state(int pid)
{
	char path[PATH_MAX], line[32];

	path_of(path, "procs/%d", pid);
	return read_line(path, line, sizeof line) ? -1 : atoi(line);
}

void set_state(int pid, int state)
{
	char path[PATH_MAX], fresh[PATH_MAX];
	FILE *file;

	path_of(path, "procs/%d", pid);
	path_of(fresh, "procs/.%d.%d", pid, gettid());
	file = fopen(fresh, "we");
	if (!file) abort();
	fprintf(file, "%d\n", state);
	fclose(file);
	if (rename(fresh, path)) abort();
}

static void note(const char *call, int pid)
{
	char path[PATH_MAX], line[128];
	int fd, size;

	path_of(path, "log");
	fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	if (fd < 0) abort();
	size = snprintf(line, sizeof line, "%s %d\n", call, pid);
	if (write(fd, line, (size_t)size) != size) abort();
	close(fd);
}

/* 1: the call is over, with *code; 0: continue normally. */
int fault(const char *call, int pid, int *code)
{
	char path[PATH_MAX], fifo[PATH_MAX + 8], line[128], byte;
	int state, count, fd;

	note(call, pid);
	path_of(path, "faults/%s.%d", call, pid);
	if (read_line(path, line, sizeof line)) {
		path_of(path, "faults/%s", call);
		if (read_line(path, line, sizeof line)) return 0;
	}
	if (!strncmp(line, "hang", 4)) {
		snprintf(fifo, sizeof fifo, "%s.fifo", path);
		fd = open(fifo, O_RDONLY | O_CLOEXEC);
		while (fd >= 0 && read(fd, &byte, 1) > 0)
			;
		if (fd >= 0) close(fd);
		return 0;
	}
	if (!strncmp(line, "die", 3)) _exit(70);
	if (!strncmp(line, "lie", 3)) {
		*code = OK;
		return 1;
	}
	count = sscanf(line, "fail %d %d", code, &state);
	if (count == 2) set_state(pid, state);
	return count >= 1;
}

int has_mode(int pid, const char *wanted)
{
	char path[PATH_MAX], line[64];

	path_of(path, "modes/%d", pid);
	if (read_line(path, line, sizeof line)) {
		path_of(path, "modes/all");
		if (read_line(path, line, sizeof line)) return 0;
	}
	line[strcspn(line, "\n")] = 0;
	return !strcmp(line, wanted);
}

static void set_mode(int pid, const char *mode)
{
	char path[PATH_MAX];
	FILE *file;

	path_of(path, "modes/%d", pid);
	file = fopen(path, "we");
	if (!file) abort();
	fprintf(file, "%s\n", mode);
	fclose(file);
}

/* Tests with pretended pids keep them in DIR/proc; others mean real ones. */
static int is_alive(int pid)
{
	char path[PATH_MAX];

	path_of(path, "proc/%d", pid);
	if (!access(path, F_OK)) return 1;
	path_of(path, "proc/pretended");
	return access(path, F_OK) && !kill(pid, 0);
}

static void end_process(int pid)
{
	char path[PATH_MAX], gone[PATH_MAX];

	path_of(path, "proc/%d", pid);
	path_of(gone, "proc/%d.gone", pid);
	if (rename(path, gone)) kill(pid, SIGSEGV);
	path_of(path, "procs/%d", pid);
	unlink(path);
}

/* Records those that died while restored and running. */
static void note_deaths(void)
{
	char path[PATH_MAX];
	struct dirent *entry;
	DIR *directory;
	FILE *file;
	int pid;

	path_of(path, "restored");
	directory = opendir(path);
	while (directory && (entry = readdir(directory))) {
		pid = atoi(entry->d_name);
		if (pid <= 0 || is_alive(pid)) continue;
		path_of(path, "host_hung");
		file = fopen(path, "ae");
		if (!file) abort();
		fprintf(file, "%d\n", pid);
		fclose(file);
		path_of(path, "restored/%d", pid);
		unlink(path);
	}
	if (directory) closedir(directory);
}

static void mark_restored(int pid, int restored)
{
	char path[PATH_MAX];
	int fd;

	path_of(path, "restored");
	mkdir(path, 0700);
	path_of(path, "restored/%d", pid);
	if (!restored) {
		unlink(path);
		return;
	}
	fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	if (fd >= 0) close(fd);
}

static int other_is_locked(int pid)
{
	char path[PATH_MAX];
	struct dirent *entry;
	DIR *directory;
	int other, held = 0;

	path_of(path, "procs");
	directory = opendir(path);
	while (directory && (entry = readdir(directory))) {
		other = atoi(entry->d_name);
		if (other > 0 && other != pid && get_state(other) == LOCKED) held = 1;
	}
	if (directory) closedir(directory);
	return held;
}

/* Returns a descriptor that keeps other calls out until it is closed: between the look at the others
 * and the change of state none of them may change, else two are locked and wait for each other. */
static int wait_for_others(int pid)
{
	char path[PATH_MAX];
	int turn;

	path_of(path, "turn");
	while (has_mode(pid, "one_at_a_time")) {
		turn = open(path, O_RDONLY | O_CREAT | O_CLOEXEC, 0600);
		if (turn < 0 || flock(turn, LOCK_EX)) abort();
		if (!other_is_locked(pid)) return turn;
		close(turn);
		usleep(1000);
	}
	return -1;
}

static int move_memory(const char *call, int pid)
{
	char path[PATH_MAX], command[PATH_MAX + 64];

	if (strcmp(call, "checkpoint") && strcmp(call, "restore")) return 0;
	path_of(path, "hook");
	if (access(path, X_OK)) return 0;
	snprintf(command, sizeof command, "%s %s %d", path, call, pid);
	return system(command);
}

static int act(const char *call, int pid, int from, int to)
{
	int code, state;

	if (fault(call, pid, &code)) return code;
	state = get_state(pid);
	if (state < 0) return INVALID_VALUE;
	if (has_mode(pid, "cuinit_only")) return NOT_INITIALIZED;
	if (has_mode(pid, "lock_kills") && to == LOCKED && from == RUNNING) {
		end_process(pid);
		return OPERATING_SYSTEM;
	}
	if (has_mode(pid, "lost")) return to == LOCKED ? OPERATING_SYSTEM : ILLEGAL_STATE;
	if (state != from) return ILLEGAL_STATE;
	if (has_mode(pid, "final_oom") && from == CHECKPOINTED) {
		set_mode(pid, "lost");
		return OUT_OF_MEMORY;
	}
	if (move_memory(call, pid)) return OUT_OF_MEMORY;
	set_state(pid, to);
	if (to == CHECKPOINTED) mark_restored(pid, 0);
	if (from == CHECKPOINTED) mark_restored(pid, 1);
	return OK;
}

static int step(const char *call, int pid, int from, int to)
{
	int code, turn;

	if (!initialised) return NOT_INITIALIZED;
	note_deaths();
	turn = wait_for_others(pid);
	code = act(call, pid, from, to);
	if (turn >= 0) close(turn);
	return code;
}

int cuInit(unsigned flags)
{
	int code = OK;

	(void)flags;
	if (fault("cuInit", 0, &code)) return code;
	initialised = 1;
	return OK;
}

int cuDriverGetVersion(int *version)
{
	char path[PATH_MAX], line[32];

	path_of(path, "version");
	*version = read_line(path, line, sizeof line) ? 13000 : atoi(line);
	return OK;
}

static const struct { int code; const char *name, *text; } errors[] = {
	{ 1, "CUDA_ERROR_INVALID_VALUE", "invalid argument" },
	{ 2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory" },
	{ 3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error" },
	{ 100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected" },
	{ 304, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS" },
	{ 401, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state" },
	{ 600, "CUDA_ERROR_NOT_READY", "device not ready" },
	{ 801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported" },
	{ 999, "CUDA_ERROR_UNKNOWN", "unknown error" },
};

static int words(int code, const char **out, int want_name)
{
	for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
		if (errors[i].code == code) {
			*out = want_name ? errors[i].name : errors[i].text;
			return OK;
		}
	*out = NULL;
	return INVALID_VALUE;
}

int cuGetErrorName(int code, const char **out) { return words(code, out, 1); }
int cuGetErrorString(int code, const char **out) { return words(code, out, 0); }

#ifndef BEFORE_570
int cuCheckpointProcessGetRestoreThreadId(int pid, int *tid)
{
	int code;

	if (!initialised) return NOT_INITIALIZED;
	if (fault("restore_tid", pid, &code)) return code;
	if (get_state(pid) < 0 || has_mode(pid, "nvml_only")) return INVALID_VALUE;
	*tid = pid;
	return OK;
}

int cuCheckpointProcessGetState(int pid, int *state)
{
	int code, now;

	if (!initialised) return NOT_INITIALIZED;
	if (fault("state", pid, &code)) return code;
	now = get_state(pid);
	/* As the driver does: a process without CUDA counts as running (facts: dynamo's cuda.go). */
	*state = now < 0 ? RUNNING : now;
	if (has_mode(pid, "busy")) {
		*state = now == CHECKPOINTED ? RESTORING : CHECKPOINTING;
		set_mode(pid, "ready");
	}
	return OK;
}

/* Every structure is 64 bytes and, but for the lock's timeout, must be zero. */
static int clean(const void *args, size_t from)
{
	static const char zero[64];

	return !args || !memcmp((const char *)args + from, zero + from, 64 - from);
}

int cuCheckpointProcessLock(int pid, void *args)
{
	return clean(args, 4) ? step("lock", pid, RUNNING, LOCKED) : INVALID_VALUE;
}

int cuCheckpointProcessCheckpoint(int pid, void *args)
{
	return clean(args, 0) ? step("checkpoint", pid, LOCKED, CHECKPOINTED) : INVALID_VALUE;
}

int cuCheckpointProcessUnlock(int pid, void *args)
{
	return clean(args, 0) ? step("unlock", pid, LOCKED, RUNNING) : INVALID_VALUE;
}

#ifndef WITHOUT_RESTORE
int cuCheckpointProcessRestore(int pid, void *args)
{
	return clean(args, 0) ? step("restore", pid, CHECKPOINTED, LOCKED) : INVALID_VALUE;
}
#endif
#endif
