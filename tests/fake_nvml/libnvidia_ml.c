/* A libnvidia-ml.so.1 without a GPU: what NVML says of the ledger of simulated GPUs.
 *
 * DIR is the directory that the library was loaded from. DIR/ledger holds the path of the ledger
 * (tests/standin/ledger.py), which gives the GPUs, their capacity and who holds how much. What a
 * process holds counts while it lives, as with a real driver.
 *
 * DIR/foreign, lines "GPU PID BYTES": processes that are no engines. DIR/version: the driver's.
 * DIR/late, a number of milliseconds: what a process held is still shown, and still in use, for so
 * long after it has ended. DIR/unknown, lines "PID" or "all": their bytes are NOT_AVAILABLE (WSL,
 * some vGPUs); the device's own figures are right.
 *
 * DIR/reserved, a number of bytes: what the driver keeps of each GPU. The capacity is without it, as
 * CUDA's total is; the first version of the memory call counts it as total and as used, the second
 * names it (an idle H200: 615 MiB).
 *
 * DIR/mig, lines "GPU": MIG is on there; NVML shows no processes of the whole device then.
 *
 * DIR/faults/CALL (init, count, handle, memory, processes) is a fault to order:
 *   fail CODE    the call returns CODE (15: the GPU is lost)
 *   hang         the call blocks until the FIFO beside it (FAULT.fifo) is opened and closed
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, INSUFFICIENT_SIZE = 7, VERSION_MISMATCH = 25 };
#define NOT_AVAILABLE (~0ull)
#define MOST 512

typedef struct { unsigned pid; unsigned long long used; unsigned instance, compute; } Process;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory2;
typedef struct { int gpu; unsigned pid; unsigned long long bytes; long long until; } Row;

static int initialised;
static Row seen[MOST]; /* with their processes gone: until when they are shown */
static int seen_count;

static void path_of(char *out, const char *format, ...)
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

static char *read_file(const char *path)
{
	FILE *file = fopen(path, "re");
	char *text;
	size_t size;

	if (!file) return NULL;
	text = calloc(1, 1 << 20);
	if (!text) abort();
	size = fread(text, 1, (1 << 20) - 1, file);
	text[size] = 0;
	fclose(file);
	return text;
}

/* 1: the call is over, with *code; 0: continue normally. */
static int fault(const char *call, int *code)
{
	char path[PATH_MAX], fifo[PATH_MAX + 8], byte;
	char *line;
	int fd, over = 0;

	path_of(path, "faults/%s", call);
	line = read_file(path);
	if (!line) return 0;
	if (!strncmp(line, "hang", 4)) {
		snprintf(fifo, sizeof fifo, "%s.fifo", path);
		fd = open(fifo, O_RDONLY | O_CLOEXEC);
		while (fd >= 0 && read(fd, &byte, 1) > 0)
			;
		if (fd >= 0) close(fd);
	} else {
		over = sscanf(line, "fail %d", code) == 1;
	}
	free(line);
	return over;
}

static long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000ll + now.tv_nsec / 1000000;
}

/* A process counts while it has the start time that its row was made with, and is not ending. */
static int is_alive(unsigned pid, long long start)
{
	char path[64], *text, *fields, state;
	unsigned long flags = 0;
	long long began = -1;
	int alive = 0;

	snprintf(path, sizeof path, "/proc/%u/stat", pid);
	text = read_file(path);
	if (!text) return 0;
	fields = strrchr(text, ')');
	if (fields && sscanf(fields + 2, "%c %*s %*s %*s %*s %*s %lu %*s %*s %*s %*s %*s %*s %*s %*s"
			     " %*s %*s %*s %*s %lld", &state, &flags, &began) == 3)
		alive = state != 'Z' && state != 'X' && !(flags & 4) && llabs(began - start) <= 1;
	free(text);
	return alive;
}

static char *ledger(void)
{
	char path[PATH_MAX], *name, *text;

	path_of(path, "ledger");
	name = read_file(path);
	if (!name) return NULL;
	name[strcspn(name, "\n")] = 0;
	text = read_file(name);
	free(name);
	return text;
}

static long long number_after(const char *text, const char *end, const char *key)
{
	const char *at = strstr(text, key);

	return at && at < end ? atoll(at + strlen(key)) : -1;
}

static int late_ms(void)
{
	char path[PATH_MAX], *text;
	int late;

	path_of(path, "late");
	text = read_file(path);
	late = text ? atoi(text) : 0;
	free(text);
	return late;
}

static int add(Row *rows, int count, int gpu, unsigned pid, unsigned long long bytes)
{
	for (int i = 0; i < count; i++)
		if (rows[i].gpu == gpu && rows[i].pid == pid) {
			rows[i].bytes += bytes;
			return count;
		}
	if (count == MOST) abort();
	rows[count] = (Row){ gpu, pid, bytes, 0 };
	return count + 1;
}

/* The living, the foreign, and those whose memory is still on its way back. */
static int rows_now(Row *rows)
{
	char path[PATH_MAX], *text = ledger(), *at, *end;
	long long now = now_ms(), late = late_ms();
	int count = 0, kept = 0;

	at = text ? strstr(text, "\"rows\"") : NULL;
	while (at && (at = strchr(at, '{')) && (end = strchr(at, '}'))) {
		unsigned pid = (unsigned)number_after(at, end, "\"pid\":");

		if (is_alive(pid, number_after(at, end, "\"start\":")))
			count = add(rows, count, (int)number_after(at, end, "\"gpu\":"), pid,
				    (unsigned long long)number_after(at, end, "\"bytes\":"));
		at = end;
	}
	free(text);
	for (int i = 0; i < seen_count; i++) { /* gone since the last look, or before it */
		int there = 0;

		for (int j = 0; j < count; j++) there |= rows[j].pid == seen[i].pid;
		if (there) continue;
		if (!seen[i].until) seen[i].until = now + late;
		if (now < seen[i].until) seen[kept++] = seen[i];
	}
	seen_count = kept;
	for (int i = 0; i < count && seen_count < MOST; i++) seen[seen_count++] = rows[i];
	for (int i = 0; i < kept; i++) count = add(rows, count, seen[i].gpu, seen[i].pid, seen[i].bytes);
	path_of(path, "foreign");
	text = read_file(path);
	for (at = text; at && *at; at = strchr(at, '\n') ? strchr(at, '\n') + 1 : NULL) {
		unsigned long long bytes;
		unsigned pid;
		int gpu;

		if (sscanf(at, "%d %u %llu", &gpu, &pid, &bytes) == 3)
			count = add(rows, count, gpu, pid, bytes);
	}
	free(text);
	return count;
}

/* Is there a line of the number, or one that says all? */
static int is_listed(const char *file, unsigned number)
{
	char path[PATH_MAX], *text, word[16];
	int listed = 0;

	path_of(path, "%s", file);
	text = read_file(path);
	snprintf(word, sizeof word, "%u", number);
	for (char *at = text ? strtok(text, "\n") : NULL; at; at = strtok(NULL, "\n"))
		listed |= !strcmp(at, "all") || !strcmp(at, word);
	free(text);
	return listed;
}

static unsigned long long capacity(int gpu)
{
	char key[16], *text = ledger(), *gpus, *at, *end;
	long long found = -1;

	snprintf(key, sizeof key, "\"%d\":", gpu);
	gpus = text ? strstr(text, "\"gpus\"") : NULL;
	at = gpus ? strstr(gpus, key) : NULL;
	end = at ? strchr(at, '}') : NULL;
	if (end) found = number_after(at, end, "\"capacity\":");
	free(text);
	return found < 0 ? 0 : (unsigned long long)found;
}

int nvmlInit_v2(void)
{
	int code = OK;

	if (fault("init", &code)) return code;
	initialised = 1;
	return OK;
}

int nvmlShutdown(void)
{
	initialised = 0;
	return OK;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
	int code = OK;

	if (!initialised) return UNINITIALIZED;
	if (fault("count", &code)) return code;
	for (*count = 0; capacity((int)*count); ++*count)
		;
	return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device)
{
	int code = OK;

	if (!initialised) return UNINITIALIZED;
	if (fault("handle", &code)) return code;
	if (!capacity((int)index)) return INVALID_ARGUMENT;
	*device = (void *)(size_t)(index + 1);
	return OK;
}

static unsigned long long reserved(void)
{
	char path[PATH_MAX];
	unsigned long long bytes = 0;
	char *text;

	path_of(path, "reserved");
	text = read_file(path);
	if (text) sscanf(text, "%llu", &bytes);
	free(text);
	return bytes;
}

int nvmlDeviceGetMemoryInfo(void *device, Memory *memory)
{
	static Row rows[MOST];
	int code = OK, gpu = (int)(size_t)device - 1;

	if (!initialised) return UNINITIALIZED;
	if (fault("memory", &code)) return code;
	memory->total = capacity(gpu) + reserved();
	memory->used = reserved();
	for (int i = 0, count = rows_now(rows); i < count; i++)
		if (rows[i].gpu == gpu) memory->used += rows[i].bytes;
	memory->free = memory->used > memory->total ? 0 : memory->total - memory->used;
	return OK;
}

#ifndef BEFORE_510
int nvmlDeviceGetMemoryInfo_v2(void *device, Memory2 *out)
{
	Memory memory;
	int code;

	if (out->version != (sizeof *out | 2u << 24)) return VERSION_MISMATCH;
	code = nvmlDeviceGetMemoryInfo(device, &memory);
	if (code) return code;
	out->total = memory.total;
	out->reserved = reserved();
	out->free = memory.free;
	out->used = memory.used - out->reserved;
	return OK;
}
#endif

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *size, Process *out)
{
	static Row rows[MOST];
	int code = OK, gpu = (int)(size_t)device - 1;
	unsigned room = *size;

	if (!initialised) return UNINITIALIZED;
	if (fault("processes", &code)) return code;
	*size = 0;
	if (is_listed("mig", (unsigned)gpu)) return OK;
	for (int i = 0, count = rows_now(rows); i < count; i++) {
		if (rows[i].gpu != gpu) continue;
		if (*size < room) {
			unsigned long long bytes = is_listed("unknown", rows[i].pid) ? NOT_AVAILABLE : rows[i].bytes;

			out[*size] = (Process){ rows[i].pid, bytes, ~0u, ~0u };
		}
		++*size;
	}
	return *size > room ? INSUFFICIENT_SIZE : OK;
}

int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending)
{
	if (!initialised) return UNINITIALIZED;
	*current = *pending = (unsigned)is_listed("mig", (unsigned)(size_t)device - 1);
	return OK;
}

int nvmlSystemGetDriverVersion(char *out, unsigned size)
{
	char path[PATH_MAX], *text;

	path_of(path, "version");
	text = read_file(path);
	snprintf(out, size, "%.*s", text ? (int)strcspn(text, "\n") : 10, text ? text : "580.159.03");
	free(text);
	return OK;
}

const char *nvmlErrorString(int code)
{
	switch (code) {
	case OK: return "Success";
	case UNINITIALIZED: return "Uninitialized";
	case INVALID_ARGUMENT: return "Invalid Argument";
	case 15: return "GPU is lost";
	case 999: return "Unknown Error";
	default: return "Error";
	}
}
