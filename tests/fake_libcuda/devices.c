/* The calls by which a context is made on each GPU. GPUS and FAILS (the code of cuInit, as when an
 * engine cannot load nvidia-uvm) are macros. 2 GiB of 8 are free. */
#include <stddef.h>

int cuInit(unsigned flags) { (void)flags; return FAILS; }
int cuDeviceGetCount(int *count) { *count = GPUS; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return number < GPUS ? 0 : 101; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = NULL; return device < GPUS ? 0 : 101; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device < GPUS ? 0 : 101; }
int cuCtxSetCurrent(void *context) { return context == NULL ? 0 : 201; }

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
	*free_bytes = (size_t)2 << 30;
	*total = (size_t)8 << 30;
	return 0;
}

int cuGetErrorString(int code, const char **text)
{
	*text = code == 100 ? "no CUDA-capable device is detected" : "unknown error";
	return 0;
}
