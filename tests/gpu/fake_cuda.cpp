/* A CUDA driver over ordinary memory: the driver API's symbols that mer_device uses, for tests.
 *
 * A device's memory is the host's, of a size that the environment sets (MER_FAKE_VRAM, bytes; MER_FAKE_DEVICES, how
 * many). Every call is checked as the real driver would, or more strictly: a thread without a context, a pointer that
 * is not the device's, a copy beyond an allocation are errors. New memory is full of 0xa5, and no address of it is given
 * twice: whoever still has one of a device that was lost, and gives it back late, gives back nothing of anybody else's.
 *
 * Copies and kernels happen at once, or, after mer_fake_defer(1), no sooner than somebody waits for them or asks an
 * event: then an order that no stream or event enforces is seldom the one that was hoped for. Faults are ordered by
 * the functions at the end. */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "fake_errors.h"
#include "fibers.h"

namespace {

typedef std::map<uintptr_t, size_t> ranges;

struct stream;
struct record {
    bool done;
    double at_ms;
    stream *on;
};
struct event {
    std::shared_ptr<record> last;
};
struct stream {
    std::deque<std::function<void()>> waiting;
};

std::recursive_mutex lock;
bool initialised, deferred;
size_t vram, taken, used;
ranges device_memory, pinned, registered;
std::set<stream *> streams;
std::set<event *> events;
std::set<void *> modules;
long fail_alloc, fail_after, once_after, launches, copied_in, copied_out, copies, waits;
int sticky, failing, once;
thread_local int current = -1;
stream default_stream;

size_t from_environment(const char *name, size_t otherwise) {
    const char *const text = getenv(name);
    return text ? strtoull(text, nullptr, 0) : otherwise;
}

int n_devices() { return (int)from_environment("MER_FAKE_DEVICES", 1); }
size_t default_vram() { return from_environment("MER_FAKE_VRAM", 256u << 20); }

double now_ms() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

/* What every call asks first: a lost device fails all that follows. */
int enter(bool context = true) {
    if (!initialised) return NOT_INITIALIZED;
    if (context && current < 0) return INVALID_CONTEXT;
    if (!sticky && fail_after > 0 && --fail_after == 0) sticky = failing;
    if (!sticky && once_after > 0 && --once_after == 0) return once;
    return sticky;
}
#define ENTER(...)                                       \
    const std::lock_guard<std::recursive_mutex> guard(lock); \
    if (const int failed = enter(__VA_ARGS__)) return failed;

bool inside(const ranges &all, uint64_t p, size_t n) {
    auto at = all.upper_bound(p);
    if (at == all.begin()) return false;
    --at;
    return p + n <= at->first + at->second;
}

bool overlaps(const ranges &all, uint64_t p, size_t n) {
    const auto at = all.lower_bound(p);
    if (at != all.end() && at->first < p + n) return true;
    return inside(all, p, 0) && !(at != all.begin() && std::prev(at)->first + std::prev(at)->second == p);
}

/* The device reaches its own memory and pinned memory of the host. */
bool reachable(uint64_t p, size_t n) {
    return inside(device_memory, p, n) || inside(pinned, p, n) || inside(registered, p, n);
}

bool known(stream *s) { return s == nullptr || streams.count(s); }

void run_one(stream *s) {
    const std::function<void()> next = s->waiting.front();
    s->waiting.pop_front();
    next();
}

void drain(stream *s) {
    while (!s->waiting.empty()) run_one(s);
}

void drain_all() {
    drain(&default_stream);
    for (stream *s : streams) drain(s);
}

void finish(const std::shared_ptr<record> &r) {
    while (!r->done && !r->on->waiting.empty()) run_one(r->on);
}

void *map_memory(size_t bytes) {
    static uintptr_t next = (uintptr_t)1 << 44;
    const size_t whole = (bytes + 4095) & ~(size_t)4095;
    void *const at = mmap((void *)next, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    next += whole;
    memset(at, 0xa5, bytes);
    return at;
}

void unmap_memory(uintptr_t at, size_t bytes) { munmap((void *)at, (bytes + 4095) & ~(size_t)4095); }

int submit(stream *s, std::function<void()> work) {
    if (!known(s)) return INVALID_HANDLE;
    if (!s) s = &default_stream;
    s->waiting.push_back(work);
    if (!deferred) drain(s);
    return sticky;
}

} // namespace

#define API extern "C" __attribute__((visibility("default"))) int

API cuInit(unsigned) {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    if (n_devices() == 0) return NO_DEVICE;
    if (!initialised) vram = default_vram();
    initialised = true;
    return SUCCESS;
}

API cuDriverGetVersion(int *version) {
    *version = 13000;
    return SUCCESS;
}

API cuDeviceGetCount(int *count) {
    ENTER(false)
    *count = n_devices();
    return SUCCESS;
}

API cuDeviceGet(int *device, int ordinal) {
    ENTER(false)
    if (ordinal < 0 || ordinal >= n_devices()) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

API cuDeviceGetName(char *name, int room, int) {
    ENTER(false)
    strncpy(name, "Simulated GPU", (size_t)room - 1);
    name[room - 1] = 0;
    return SUCCESS;
}

API cuDeviceGetAttribute(int *value, int attribute, int) {
    ENTER(false)
    switch (attribute) {
    case 1: *value = 1024; break;          /* threads of a block */
    case 8: *value = 48 << 10; break;      /* shared memory of a block */
    case 10: *value = 32; break;           /* lanes of a warp */
    case 16: *value = 2; break;            /* multiprocessors */
    case 19: case 41: *value = 1; break;   /* maps the host's memory, one address space */
    case 75: *value = 9; break;            /* compute capability */
    case 76: *value = 0; break;
    case 97: *value = 227 << 10; break;    /* shared memory of a block that asks for more */
    default: *value = 0;
    }
    return SUCCESS;
}

API cuDeviceTotalMem_v2(size_t *bytes, int) {
    ENTER(false)
    *bytes = vram;
    return SUCCESS;
}

API cuDevicePrimaryCtxRetain(void **context, int device) {
    ENTER(false)
    if (device < 0 || device >= n_devices()) return INVALID_DEVICE;
    *context = (void *)(uintptr_t)(device + 1);
    return SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int) {
    ENTER(false)
    return SUCCESS;
}

API cuCtxSetCurrent(void *context) {
    ENTER(false)
    if ((uintptr_t)context > (uintptr_t)n_devices()) return INVALID_CONTEXT;
    current = (int)(uintptr_t)context - 1;
    return SUCCESS;
}

API cuCtxGetCurrent(void **context) {
    *context = (void *)(uintptr_t)(current + 1);
    return SUCCESS;
}

API cuMemGetInfo_v2(size_t *free, size_t *total) {
    ENTER()
    const size_t gone = used + taken;
    *free = gone < vram ? vram - gone : 0;
    *total = vram;
    return SUCCESS;
}

API cuMemAlloc_v2(uint64_t *p, size_t bytes) {
    ENTER()
    if (!bytes) return INVALID_VALUE;
    const size_t whole = (bytes + 511) & ~(size_t)511;
    if (fail_alloc > 0 && --fail_alloc == 0) return OUT_OF_MEMORY;
    if (used + taken + whole > vram) return OUT_OF_MEMORY;
    void *const at = map_memory(whole);
    if (!at) return OUT_OF_MEMORY;
    device_memory[(uintptr_t)at] = bytes;
    used += whole;
    *p = (uintptr_t)at;
    return SUCCESS;
}

API cuMemFree_v2(uint64_t p) {
    ENTER()
    if (!p) return SUCCESS;
    const auto at = device_memory.find(p);
    if (at == device_memory.end()) return INVALID_VALUE;
    drain_all();
    used -= (at->second + 511) & ~(size_t)511;
    unmap_memory(p, at->second);
    device_memory.erase(at);
    return sticky;
}

API cuMemHostAlloc(void **p, size_t bytes, unsigned) {
    ENTER()
    if (!bytes) return INVALID_VALUE;
    if (fail_alloc > 0 && --fail_alloc == 0) return OUT_OF_MEMORY;
    *p = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
    if (!*p) return OUT_OF_MEMORY;
    memset(*p, 0xa5, bytes);
    pinned[(uintptr_t)*p] = bytes;
    return SUCCESS;
}

API cuMemFreeHost(void *p) {
    ENTER()
    if (!pinned.count((uintptr_t)p)) return INVALID_VALUE;
    drain_all();
    pinned.erase((uintptr_t)p);
    free(p);
    return sticky;
}

API cuMemHostRegister_v2(void *p, size_t bytes, unsigned) {
    ENTER()
    if (!p || !bytes) return INVALID_VALUE;
    if (overlaps(registered, (uintptr_t)p, bytes)) return HOST_MEMORY_ALREADY_REGISTERED;
    if (fail_alloc > 0 && --fail_alloc == 0) return OUT_OF_MEMORY;
    registered[(uintptr_t)p] = bytes;
    return SUCCESS;
}

API cuMemHostUnregister(void *p) {
    ENTER()
    if (!registered.count((uintptr_t)p)) return HOST_MEMORY_NOT_REGISTERED;
    drain_all();
    registered.erase((uintptr_t)p);
    return sticky;
}

API cuMemHostGetDevicePointer_v2(uint64_t *p, void *host, unsigned) {
    ENTER()
    if (!inside(pinned, (uintptr_t)host, 1) && !inside(registered, (uintptr_t)host, 1)) return INVALID_VALUE;
    *p = (uintptr_t)host;
    return SUCCESS;
}

API cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, stream *s) {
    ENTER()
    if (!reachable(to, bytes)) return INVALID_VALUE;
    copied_in += (long)bytes;
    copies++;
    return submit(s, [=] { memcpy((void *)to, from, bytes); });
}

API cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, stream *s) {
    ENTER()
    if (!reachable(from, bytes)) return INVALID_VALUE;
    copied_out += (long)bytes;
    copies++;
    return submit(s, [=] { memcpy(to, (const void *)from, bytes); });
}

API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, stream *s) {
    ENTER()
    if (!reachable(to, bytes) || !reachable(from, bytes)) return INVALID_VALUE;
    return submit(s, [=] { memmove((void *)to, (const void *)from, bytes); });
}

API cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, stream *s) {
    ENTER()
    if (!reachable(to, bytes)) return INVALID_VALUE;
    return submit(s, [=] { memset((void *)to, value, bytes); });
}

API cuStreamCreate(stream **s, unsigned) {
    ENTER()
    streams.insert(*s = new stream);
    return SUCCESS;
}

API cuStreamDestroy_v2(stream *s) {
    ENTER()
    if (!streams.count(s)) return INVALID_HANDLE;
    drain(s);
    streams.erase(s);
    delete s;
    return sticky;
}

API cuStreamSynchronize(stream *s) {
    ENTER()
    if (!known(s)) return INVALID_HANDLE;
    waits++;
    drain(s ? s : &default_stream);
    return sticky;
}

API cuStreamWaitEvent(stream *s, event *e, unsigned) {
    ENTER()
    if (!events.count(e)) return INVALID_HANDLE;
    const std::shared_ptr<record> r = e->last;
    if (!r) return known(s) ? SUCCESS : INVALID_HANDLE;
    return submit(s, [r] { finish(r); });
}

API cuEventCreate(event **e, unsigned) {
    ENTER()
    events.insert(*e = new event);
    return SUCCESS;
}

API cuEventDestroy_v2(event *e) {
    ENTER()
    if (!events.count(e)) return INVALID_HANDLE;
    events.erase(e);
    delete e;
    return SUCCESS;
}

API cuEventRecord(event *e, stream *s) {
    ENTER()
    if (!events.count(e) || !known(s)) return INVALID_HANDLE;
    const auto r = std::make_shared<record>(record{false, 0, s ? s : &default_stream});
    e->last = r;
    return submit(s, [r] {
        r->done = true;
        r->at_ms = now_ms();
    });
}

/* When deferred, each question lets the stream take one step. */
API cuEventQuery(event *e) {
    ENTER()
    if (!events.count(e)) return INVALID_HANDLE;
    if (!e->last || e->last->done) return SUCCESS;
    run_one(e->last->on);
    if (sticky) return sticky;
    return e->last->done ? SUCCESS : NOT_READY;
}

API cuEventSynchronize(event *e) {
    ENTER()
    if (!events.count(e)) return INVALID_HANDLE;
    waits++;
    if (e->last) finish(e->last);
    return sticky;
}

API cuEventElapsedTime(float *ms, event *from, event *to) {
    ENTER()
    if (!events.count(from) || !events.count(to) || !from->last || !to->last) return INVALID_HANDLE;
    if (!from->last->done || !to->last->done) return NOT_READY;
    *ms = (float)(to->last->at_ms - from->last->at_ms);
    return SUCCESS;
}

/* Any image will do, the kernels are in this library, but for one that says it is bad. */
API cuModuleLoadData(void **module, const void *image) {
    ENTER()
    if (!image || !strncmp((const char *)image, "bad", 3)) return INVALID_IMAGE;
    modules.insert(*module = new char);
    return SUCCESS;
}

API cuModuleUnload(void *module) {
    ENTER()
    if (!modules.erase(module)) return INVALID_HANDLE;
    delete (char *)module;
    return SUCCESS;
}

API cuModuleGetFunction(const void **function, void *module, const char *name) {
    ENTER()
    if (!modules.count(module)) return INVALID_HANDLE;
    *function = simulated::find_kernel(name);
    return *function ? SUCCESS : NOT_FOUND;
}

API cuFuncGetAttribute(int *value, int attribute, const void *) {
    ENTER()
    *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0; /* threads of a block, registers */
    return SUCCESS;
}

API cuFuncSetAttribute(const void *, int, int) {
    ENTER()
    return SUCCESS;
}

API cuLaunchKernel(const void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, stream *s, void **params, void **) {
    ENTER()
    const size_t threads = (size_t)bx * by * bz;
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || !threads || threads > 1024 || shared > 227u << 10)
        return INVALID_VALUE;
    launches++;
    const simulated::call kernel = (*(const simulated::bind *)function)(params);
    return submit(s, [=] {
        if (!sticky && !simulated::run_grid(kernel, {gx, gy, gz}, {bx, by, bz}, shared)) sticky = LAUNCH_FAILED;
    });
}

API cuGetErrorName(int code, const char **name) {
    for (const named &n : names)
        if (n.code == code) return *name = n.name, SUCCESS;
    return INVALID_VALUE;
}

API cuGetErrorString(int code, const char **text) {
    for (const named &n : names)
        if (n.code == code) return *text = n.text, SUCCESS;
    return INVALID_VALUE;
}

/* For tests. */

/* No more faults, copies and kernels at once, the memory's size as the environment has it. What was allocated stays,
 * unless the device was lost: then all of it is gone. */
extern "C" void mer_fake_reset(void) {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    drain_all();
    if (sticky) {
        for (const auto &each : device_memory) unmap_memory(each.first, each.second);
        device_memory.clear();
        registered.clear();
        used = 0;
    }
    deferred = false;
    vram = default_vram();
    taken = 0;
    fail_alloc = fail_after = once_after = launches = copied_in = copied_out = copies = waits = 0;
    sticky = 0;
}

/* The memory of the device, in bytes. */
extern "C" void mer_fake_vram(size_t bytes) { vram = bytes; }

/* Another process holds so much of it. */
extern "C" void mer_fake_taken(size_t bytes) { taken = bytes; }

/* The n-th allocation from now on (1: the next), of the device or pinned, finds no memory. */
extern "C" void mer_fake_fail_alloc(long n) { fail_alloc = n; }

/* From the n-th call on (1: the next) every call returns `error`, as after the loss of a device; 0: none. */
extern "C" void mer_fake_fail_from(long n, int error) {
    fail_after = n;
    failing = error;
}

/* The n-th call from now on (1: the next) returns `error` and does nothing; the others work. */
extern "C" void mer_fake_fail_once(long n, int error) {
    once_after = n;
    once = error;
}

/* Copies and kernels wait until somebody waits for them. */
extern "C" void mer_fake_defer(int yes) {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    drain_all();
    deferred = yes;
}

/* Allocations of the device, their bytes, pinned allocations, registered ranges, streams, events, modules (all: now);
 * launches, bytes copied to the device, bytes copied from it, copies, waits for the device (since mer_fake_reset()). */
extern "C" void mer_fake_counts(long out[12]) {
    const std::lock_guard<std::recursive_mutex> guard(lock);
    const long counts[12] = {(long)device_memory.size(), (long)used,           (long)pinned.size(), (long)registered.size(),
                             (long)streams.size(),       (long)events.size(),  (long)modules.size(), launches,
                             copied_in,                  copied_out,           copies,              waits};
    memcpy(out, counts, sizeof counts);
}
