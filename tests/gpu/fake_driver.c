/* A driver of CUDA that answers and computes nothing; what it says is given by -D. See fake_drivers.py. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int cuInit(unsigned flags) { return flags ? 1 : INIT; }
int cuDriverGetVersion(int *version) { return *version = VERSION, 0; }
int cuGetErrorString(int error, const char **text) {
    return *text = error == 2 ? "out of memory" : error == 100 ? "no CUDA-capable device is detected" : "broken", 0;
}
int cuDeviceGetCount(int *count) { return *count = COUNT, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal + 7, 0; }
int cuDeviceGetName(char *name, int room, int device) {
    strncpy(name, NAME, room);
    name[strlen(NAME) - 1] = '0' + device - 7;
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    return *value = attribute == 75 ? MAJOR : attribute == 76 ? MINOR : 4, 0;
}
int cuDeviceTotalMem_v2(size_t *total, int device) { return (void)device, *total = TOTAL, 0; }

#ifndef PROBE_ALONE /* else: a driver from before the rest of it was there */
int cuDevicePrimaryCtxRetain(void **context, int device) { return (void)device, *context = "context", CONTEXT; }
int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, 0; }
int cuCtxSetCurrent(void *context) { return context ? 0 : 201; }
int cuMemGetInfo_v2(size_t *free, size_t *total) { return *free = FREE, *total = TOTAL, 0; }
int cuMemAlloc_v2(uint64_t *pointer, size_t bytes) {
    return bytes > FREE ? 2 : (*pointer = (uint64_t)malloc(bytes), 0);
}
int cuMemFree_v2(uint64_t pointer) { return free((void *)pointer), 0; }
int cuMemHostRegister_v2(void *host, size_t bytes, unsigned flags) { return (void)host, (void)bytes, (void)flags, PIN; }
int cuMemHostUnregister(void *host) { return (void)host, 0; }
int cuMemHostGetDevicePointer_v2(uint64_t *pointer, void *host, unsigned flags) {
    return (void)flags, *pointer = (uint64_t)host, 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *s) {
    return (void)s, memcpy((void *)to, from, n), 0;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, void *s) {
    return (void)s, memcpy(to, (void *)from, n), 0;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, void *s) {
    return (void)s, memcpy((void *)to, (void *)from, n), 0;
}
int cuMemsetD8Async(uint64_t at, unsigned char byte, size_t n, void *s) {
    return (void)s, memset((void *)at, byte, n), 0;
}
int cuStreamCreate(void **stream, unsigned flags) { return (void)flags, *stream = "stream", 0; }
int cuStreamDestroy_v2(void *stream) { return (void)stream, 0; }
int cuStreamSynchronize(void *stream) { return (void)stream, 0; }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return (void)stream, (void)event, (void)flags, 0; }
int cuEventCreate(void **event, unsigned flags) { return (void)flags, *event = "event", 0; }
int cuEventDestroy_v2(void *event) { return (void)event, 0; }
int cuEventRecord(void *event, void *stream) { return (void)event, (void)stream, 0; }
int cuEventQuery(void *event) { return (void)event, 0; }
int cuEventSynchronize(void *event) { return (void)event, 0; }
int cuEventElapsedTime(float *milliseconds, void *first, void *second) {
    return (void)first, (void)second, *milliseconds = 4, 0;
}
int cuModuleLoadData(void **module, const void *image) {
    *module = "module";
    return strncmp(image, IMAGE, strlen(IMAGE)) ? 200 : 0;
}
int cuModuleUnload(void *module) { return (void)module, 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    return (void)module, (void)name, *function = NULL, 500;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return (void)function, (void)attribute, (void)value, 0; }
int cuLaunchKernel(void) { return 1; }
#endif
