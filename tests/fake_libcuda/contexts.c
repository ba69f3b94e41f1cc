/* The calls by which a process gets a context and memory on a simulated GPU. */
#define _GNU_SOURCE
#include "libcuda.h"
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_CONTEXT = 201 };

static int context;

static int count_gpus(void)
{
	char path[PATH_MAX], line[32];

	path_of(path, "gpus");
	return read_line(path, line, sizeof line) ? 1 : atoi(line);
}

int cuDeviceGetCount(int *count)
{
	if (!initialised) return NOT_INITIALIZED;
	*count = count_gpus();
	return *count ? OK : NO_DEVICE;
}

/* CUDA_VISIBLE_DEVICES makes another one the first; all are alike here. */
int cuDeviceGet(int *device, int number)
{
	if (!initialised) return NOT_INITIALIZED;
	*device = number;
	return number < count_gpus() ? OK : INVALID_DEVICE;
}

int cuDevicePrimaryCtxRetain(void **out, int device)
{
	int code;

	if (!initialised) return NOT_INITIALIZED;
	if (fault("context", getpid(), &code)) return code;
	if (device >= count_gpus()) return INVALID_DEVICE;
	*out = &context;
	if (get_state(getpid()) < 0) set_state(getpid(), RUNNING);
	return OK;
}

int cuDevicePrimaryCtxRelease_v2(int device)
{
	char path[PATH_MAX];

	if (device >= count_gpus()) return INVALID_DEVICE;
	path_of(path, "procs/%d", getpid());
	unlink(path);
	path_of(path, "restored/%d", getpid());
	unlink(path);
	return OK;
}

int cuCtxSetCurrent(void *given) { return given == &context ? OK : INVALID_CONTEXT; }

int cuMemAlloc_v2(uint64_t *address, size_t size)
{
	int code;

	if (fault("alloc", getpid(), &code)) return code;
	*address = (uint64_t)(uintptr_t)malloc(size);
	return *address ? OK : OUT_OF_MEMORY;
}

int cuMemFree_v2(uint64_t address)
{
	free((void *)(uintptr_t)address);
	return OK;
}

int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size)
{
	memcpy((void *)(uintptr_t)to, from, size);
	return OK;
}

/* A call on a process that is not running would wait for ever: here it says so. */
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size)
{
	if (get_state(getpid()) != RUNNING) return ILLEGAL_STATE;
	memcpy(to, (void *)(uintptr_t)from, size);
	if (has_mode(getpid(), "forgets")) memset(to, 0, size);
	return OK;
}
