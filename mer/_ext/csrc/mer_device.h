/* One CUDA device by the driver's API, which is opened when the program runs: nothing of CUDA is needed to build this.
 *
 * Every function returns 0 or the driver's error (mer_device_error names it). An error other than "out of memory" is kept in
 * `lost`: what is under way may never end, and every later call returns it at once. A thread calls mer_device_enter
 * before anything else. Device pointers are uint64_t. */
#ifndef MER_DEVICE_H
#define MER_DEVICE_H

#include <stddef.h>
#include <stdint.h>

/* A matrix times some tokens, as the kernels take it: the same struct is in mer/gpu/kernels. */
typedef struct {
    uint64_t weights;     /* row 0; any alignment */
    uint64_t bias;        /* f32 [rows], added to each product; 0: none */
    uint64_t y;           /* f32: where the result of its first token goes */
    uint64_t index;       /* i32 [count]: which prepared row each token is; 0: first, first + 1, ... */
    int32_t first, count; /* tokens */
} mer_gpu_product;

enum mer_device_stream {
    MER_STREAM_COMPUTE,
    MER_STREAM_COPY,   /* copies of experts */
    MER_STREAM_BLOCKS, /* copies of keys and values */
    MER_STREAMS,
};

enum {
    MER_DEVICE_OUT_OF_MEMORY = 2,
    MER_DEVICE_NOT_READY = 600,
};

typedef struct mer_driver mer_driver;

typedef struct {
    mer_driver *fn;
    void *library, *context, *module, *streams[MER_STREAMS];
    int device, ordinal, major, minor, multiprocessors, driver_version;
    int lost; /* the error that ended it, or 0 */
    char name[256];
    size_t total; /* bytes of its memory */
} mer_device;

/* Opens device `ordinal` of the driver in `library` ("libcuda.so.1"). NULL: `why` (of `room` bytes) says why not. */
mer_device *mer_device_open(const char *library, int ordinal, char *why, size_t room);
void mer_device_close(mer_device *d); /* NULL is allowed; nothing may be under way */
const char *mer_device_error(mer_device *d, int error);

int mer_device_enter(mer_device *d); /* this thread uses the device */
int mer_device_load(mer_device *d, const void *image);
int mer_device_function(mer_device *d, const char *name, void **function);
/* Bytes that a kernel may have as dynamic shared memory, where it wants more than 48 KiB. */
int mer_device_allow_shared(mer_device *d, void *function, int bytes);

int mer_device_memory(mer_device *d, size_t *free, size_t *total);
int mer_device_alloc(mer_device *d, size_t bytes, uint64_t *pointer);
int mer_device_free(mer_device *d, uint64_t pointer); /* 0 is allowed */
/* Memory of the host that the device reads and writes by itself, at *pointer. */
int mer_device_pin(mer_device *d, void *host, size_t bytes, uint64_t *pointer);
int mer_device_unpin(mer_device *d, void *host);

int mer_device_upload(mer_device *d, int stream, uint64_t to, const void *from, size_t bytes);
int mer_device_download(mer_device *d, int stream, void *to, uint64_t from, size_t bytes);
int mer_device_copy(mer_device *d, int stream, uint64_t to, uint64_t from, size_t bytes);
int mer_device_fill(mer_device *d, int stream, uint64_t at, int byte, size_t bytes);
int mer_device_launch(mer_device *d, int stream, void *function, const unsigned grid[3], unsigned threads,
                      unsigned shared, void **arguments);
int mer_device_finish(mer_device *d, int stream); /* waits until all of it is done */

/* timed: for mer_device_between. */
int mer_device_event(mer_device *d, int timed, void **event);
void mer_device_drop_event(mer_device *d, void *event);
int mer_device_record(mer_device *d, void *event, int stream);
int mer_device_follow(mer_device *d, int stream, void *event); /* what comes next in the stream waits for it */
int mer_device_ready(mer_device *d, void *event);              /* 0, MER_DEVICE_NOT_READY, or an error */
int mer_device_wait(mer_device *d, void *event);
int mer_device_between(mer_device *d, void *first, void *second, float *milliseconds);

#endif
