#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../mer_device.h"

enum {
    MULTIPROCESSOR_COUNT = 16,
    CAPABILITY_MAJOR = 75,
    CAPABILITY_MINOR = 76,
    MAX_DYNAMIC_SHARED = 8, /* of a function */
    STREAM_NON_BLOCKING = 1,
    EVENT_DISABLE_TIMING = 2,
    HOST_PORTABLE = 1,
    HOST_MAPPED = 2,
};

/* FUNCTION(name here, the driver's symbol, arguments) */
#define FUNCTIONS(FUNCTION)                                                                                       \
    FUNCTION(init, "cuInit", (unsigned))                                                                          \
    FUNCTION(version, "cuDriverGetVersion", (int *))                                                              \
    FUNCTION(error_string, "cuGetErrorString", (int, const char **))                                              \
    FUNCTION(device_count, "cuDeviceGetCount", (int *))                                                           \
    FUNCTION(device_get, "cuDeviceGet", (int *, int))                                                             \
    FUNCTION(device_name, "cuDeviceGetName", (char *, int, int))                                                  \
    FUNCTION(device_attribute, "cuDeviceGetAttribute", (int *, int, int))                                         \
    FUNCTION(device_total, "cuDeviceTotalMem_v2", (size_t *, int))                                                \
    FUNCTION(context_retain, "cuDevicePrimaryCtxRetain", (void **, int))                                          \
    FUNCTION(context_release, "cuDevicePrimaryCtxRelease_v2", (int))                                              \
    FUNCTION(context_set, "cuCtxSetCurrent", (void *))                                                            \
    FUNCTION(memory_info, "cuMemGetInfo_v2", (size_t *, size_t *))                                                \
    FUNCTION(alloc, "cuMemAlloc_v2", (uint64_t *, size_t))                                                        \
    FUNCTION(free, "cuMemFree_v2", (uint64_t))                                                                    \
    FUNCTION(host_register, "cuMemHostRegister_v2", (void *, size_t, unsigned))                                   \
    FUNCTION(host_unregister, "cuMemHostUnregister", (void *))                                                    \
    FUNCTION(host_pointer, "cuMemHostGetDevicePointer_v2", (uint64_t *, void *, unsigned))                        \
    FUNCTION(upload, "cuMemcpyHtoDAsync_v2", (uint64_t, const void *, size_t, void *))                            \
    FUNCTION(download, "cuMemcpyDtoHAsync_v2", (void *, uint64_t, size_t, void *))                                \
    FUNCTION(copy, "cuMemcpyDtoDAsync_v2", (uint64_t, uint64_t, size_t, void *))                                  \
    FUNCTION(fill, "cuMemsetD8Async", (uint64_t, unsigned char, size_t, void *))                                  \
    FUNCTION(stream_create, "cuStreamCreate", (void **, unsigned))                                                \
    FUNCTION(stream_destroy, "cuStreamDestroy_v2", (void *))                                                      \
    FUNCTION(stream_finish, "cuStreamSynchronize", (void *))                                                      \
    FUNCTION(stream_follow, "cuStreamWaitEvent", (void *, void *, unsigned))                                      \
    FUNCTION(event_create, "cuEventCreate", (void **, unsigned))                                                  \
    FUNCTION(event_destroy, "cuEventDestroy_v2", (void *))                                                        \
    FUNCTION(event_record, "cuEventRecord", (void *, void *))                                                     \
    FUNCTION(event_query, "cuEventQuery", (void *))                                                               \
    FUNCTION(event_wait, "cuEventSynchronize", (void *))                                                          \
    FUNCTION(event_between, "cuEventElapsedTime", (float *, void *, void *))                                      \
    FUNCTION(module_load, "cuModuleLoadData", (void **, const void *))                                            \
    FUNCTION(module_unload, "cuModuleUnload", (void *))                                                           \
    FUNCTION(module_function, "cuModuleGetFunction", (void **, void *, const char *))                             \
    FUNCTION(function_set, "cuFuncSetAttribute", (void *, int, int))                                              \
    FUNCTION(launch, "cuLaunchKernel", (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,       \
                                        unsigned, void *, void **, void **))

struct mer_driver {
#define POINTER(NAME, SYMBOL, ARGUMENTS) int(*NAME) ARGUMENTS;
    FUNCTIONS(POINTER)
};

/* `error`, remembered where the device does not survive it. */
static int kept(mer_device *d, int error) {
    if (error && error != MER_DEVICE_OUT_OF_MEMORY && error != MER_DEVICE_NOT_READY && !d->lost) d->lost = error;
    return error;
}

#define CALL(D, ...) ((D)->lost ? (D)->lost : kept((D), (D)->fn->__VA_ARGS__))

const char *mer_device_error(mer_device *d, int error) {
    const char *text = NULL;
    if (d->fn->error_string(error, &text) || !text) return "an error unknown to the driver";
    return text;
}

/* 0, or -1: a symbol is missing. */
static int find(mer_device *d, char *why, size_t room) {
#define FIND(NAME, SYMBOL, ARGUMENTS)                                                          \
    {                                                                                          \
        void *found = dlsym(d->library, SYMBOL);                                               \
        if (!found) {                                                                          \
            snprintf(why, room, "the driver is too old: it has no %s", SYMBOL);                \
            return -1;                                                                         \
        }                                                                                      \
        memcpy(&d->fn->NAME, &found, sizeof found);                                            \
    }
    FUNCTIONS(FIND)
    return 0;
}

static int describe(mer_device *d) {
    int error;
    if ((error = d->fn->device_get(&d->device, d->ordinal))) return error;
    if ((error = d->fn->device_name(d->name, sizeof d->name, d->device))) return error;
    if ((error = d->fn->device_total(&d->total, d->device))) return error;
    if ((error = d->fn->device_attribute(&d->major, CAPABILITY_MAJOR, d->device))) return error;
    if ((error = d->fn->device_attribute(&d->minor, CAPABILITY_MINOR, d->device))) return error;
    return d->fn->device_attribute(&d->multiprocessors, MULTIPROCESSOR_COUNT, d->device);
}

static int begin(mer_device *d) {
    int error;
    if ((error = d->fn->context_retain(&d->context, d->device))) return error;
    if ((error = d->fn->context_set(d->context))) return error;
    for (int i = 0; i < MER_STREAMS; i++)
        if ((error = d->fn->stream_create(&d->streams[i], STREAM_NON_BLOCKING))) return error;
    return 0;
}

mer_device *mer_device_open(const char *library, int ordinal, char *why, size_t room) {
    mer_device *d = calloc(1, sizeof *d);
    int error, count = 0;
    if (!d || !(d->fn = calloc(1, sizeof *d->fn))) {
        snprintf(why, room, "no memory");
        mer_device_close(d);
        return NULL;
    }
    d->ordinal = ordinal;
    d->library = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!d->library) {
        snprintf(why, room, "there is no NVIDIA driver here: %s", dlerror());
    } else if (find(d, why, room)) {
        /* said already */
    } else if ((error = d->fn->init(0)) || (error = d->fn->version(&d->driver_version)) ||
               (error = d->fn->device_count(&count))) {
        snprintf(why, room, "the driver does not start: %s", mer_device_error(d, error));
    } else if (ordinal < 0 || ordinal >= count) {
        snprintf(why, room, "there is no device %d: the driver knows %d", ordinal, count);
    } else if ((error = describe(d)) || (error = begin(d))) {
        snprintf(why, room, "device %d can't be used: %s", ordinal, mer_device_error(d, error));
    } else {
        return d;
    }
    mer_device_close(d);
    return NULL;
}

/* The library stays open: drivers keep threads of their own. */
void mer_device_close(mer_device *d) {
    if (!d) return;
    if (d->context) {
        d->fn->context_set(d->context);
        for (int i = 0; i < MER_STREAMS; i++)
            if (d->streams[i]) d->fn->stream_destroy(d->streams[i]);
        if (d->module) d->fn->module_unload(d->module);
        d->fn->context_release(d->device);
    }
    free(d->fn);
    free(d);
}

/* Of a lost device, too: its host memory and its events are still to be given back. */
int mer_device_enter(mer_device *d) {
    const int error = kept(d, d->fn->context_set(d->context));
    return d->lost ? d->lost : error;
}

int mer_device_load(mer_device *d, const void *image) { return CALL(d, module_load(&d->module, image)); }

int mer_device_function(mer_device *d, const char *name, void **function) {
    return d->lost ? d->lost : d->fn->module_function(function, d->module, name);
}

int mer_device_allow_shared(mer_device *d, void *function, int bytes) {
    return CALL(d, function_set(function, MAX_DYNAMIC_SHARED, bytes));
}

int mer_device_memory(mer_device *d, size_t *free, size_t *total) { return CALL(d, memory_info(free, total)); }

int mer_device_alloc(mer_device *d, size_t bytes, uint64_t *pointer) { return CALL(d, alloc(pointer, bytes)); }

int mer_device_free(mer_device *d, uint64_t pointer) { return pointer ? CALL(d, free(pointer)) : 0; }

/* That the host's memory can't be pinned (a limit of the system) says nothing about the device. */
int mer_device_pin(mer_device *d, void *host, size_t bytes, uint64_t *pointer) {
    int error = d->lost;
    if (error || (error = d->fn->host_register(host, bytes, HOST_PORTABLE | HOST_MAPPED))) return error;
    if ((error = d->fn->host_pointer(pointer, host, 0))) d->fn->host_unregister(host);
    return error;
}

int mer_device_unpin(mer_device *d, void *host) { return d->fn->host_unregister(host); }

int mer_device_upload(mer_device *d, int stream, uint64_t to, const void *from, size_t bytes) {
    return CALL(d, upload(to, from, bytes, d->streams[stream]));
}

int mer_device_download(mer_device *d, int stream, void *to, uint64_t from, size_t bytes) {
    return CALL(d, download(to, from, bytes, d->streams[stream]));
}

int mer_device_copy(mer_device *d, int stream, uint64_t to, uint64_t from, size_t bytes) {
    return CALL(d, copy(to, from, bytes, d->streams[stream]));
}

int mer_device_fill(mer_device *d, int stream, uint64_t at, int byte, size_t bytes) {
    return CALL(d, fill(at, (unsigned char)byte, bytes, d->streams[stream]));
}

int mer_device_launch(mer_device *d, int stream, void *function, const unsigned grid[3], unsigned threads,
                      unsigned shared, void **arguments) {
    return CALL(d, launch(function, grid[0], grid[1], grid[2], threads, 1, 1, shared, d->streams[stream], arguments,
                          NULL));
}

int mer_device_finish(mer_device *d, int stream) { return CALL(d, stream_finish(d->streams[stream])); }

int mer_device_event(mer_device *d, int timed, void **event) {
    return CALL(d, event_create(event, timed ? 0 : EVENT_DISABLE_TIMING));
}

void mer_device_drop_event(mer_device *d, void *event) {
    if (event) d->fn->event_destroy(event);
}

int mer_device_record(mer_device *d, void *event, int stream) {
    return CALL(d, event_record(event, d->streams[stream]));
}

int mer_device_follow(mer_device *d, int stream, void *event) {
    return CALL(d, stream_follow(d->streams[stream], event, 0));
}

int mer_device_ready(mer_device *d, void *event) { return CALL(d, event_query(event)); }

int mer_device_wait(mer_device *d, void *event) { return CALL(d, event_wait(event)); }

int mer_device_between(mer_device *d, void *first, void *second, float *milliseconds) {
    return CALL(d, event_between(milliseconds, first, second));
}
