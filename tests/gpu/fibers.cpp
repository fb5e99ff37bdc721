/* The threads of a block as fibers: see cuda_shim.h. */
#include "fibers.h"

#include <stdlib.h>
#include <sys/mman.h>

#include <map>
#include <string>
#include <vector>

namespace simulated {

place *here;
void *dynamic_shared;

enum { STACK = 64 << 10, WARP = 32 };
enum state { RUNS, AT_BLOCK, AT_WARP, ENDED };

struct fiber {
    void *sp;
    state is;
    place at;
    uint32_t mask, given[2]; /* words of an exchange, of this one and of that before */
    unsigned exchanges;
};

static std::vector<fiber> fibers;
static fiber *running;
static char *stacks;
static size_t n_stacks;
static void *scheduler_sp;
static const call *body;

/* Keeps what a function must keep and the stack pointer, and goes on where the other one stopped. */
#if defined(__x86_64__)
extern "C" void simulated_switch(void **from, void *to);
asm(".text\n.globl simulated_switch\n.hidden simulated_switch\nsimulated_switch:\n"
    "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
    "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
#else
#error "the simulated device knows fibers on x86-64 only"
#endif

static void yield() { simulated_switch(&running->sp, scheduler_sp); }

static void fiber_main() {
    (*body)();
    running->is = ENDED;
    yield();
}

static void *new_stack(size_t i) {
    void **top = (void **)(stacks + (i + 1) * STACK);
    *--top = nullptr; /* the return address that fiber_main() would have: keeps the stack aligned as after a call */
    *--top = (void *)fiber_main;
    return top - 6;
}

void wait_for_block() {
    running->is = AT_BLOCK;
    yield();
}

void wait_for_warp(uint32_t mask) {
    running->mask = mask;
    running->is = AT_WARP;
    yield();
}

uint32_t exchange(uint32_t mask, uint32_t word, int from) {
    const unsigned turn = running->exchanges++ % 2;
    running->given[turn] = word;
    wait_for_warp(mask);
    const size_t warp = (size_t)(running - fibers.data()) / WARP * WARP;
    return warp + from < fibers.size() ? fibers[warp + from].given[turn] : word;
}

/* Lets go those who wait for nobody any more. */
static bool release() {
    bool some = false;
    for (size_t warp = 0; warp < fibers.size(); warp += WARP) {
        const size_t end = warp + WARP < fibers.size() ? warp + WARP : fibers.size();
        bool all = true, any = false;
        for (size_t i = warp; i < end; i++) {
            any |= fibers[i].is == AT_WARP;
            all &= fibers[i].is == AT_WARP || fibers[i].is == ENDED;
        }
        for (size_t i = warp; all && any && i < end; i++)
            if (fibers[i].is == AT_WARP) fibers[i].is = RUNS;
        some |= all && any;
    }
    bool all = true, any = false;
    for (const fiber &f : fibers) {
        any |= f.is == AT_BLOCK;
        all &= f.is == AT_BLOCK || f.is == ENDED;
    }
    for (fiber &f : fibers)
        if (all && f.is == AT_BLOCK) f.is = RUNS;
    return some || (all && any);
}

static bool run_block(dim3 block, dim3 grid, dim3 dim, bool backwards) {
    const size_t n = (size_t)dim.x * dim.y * dim.z;
    fibers.assign(n, fiber());
    for (size_t i = 0; i < n; i++) {
        fiber &f = fibers[i];
        f.sp = new_stack(i);
        f.is = RUNS;
        f.at = {{(unsigned)(i % dim.x), (unsigned)(i / dim.x % dim.y), (unsigned)(i / dim.x / dim.y)}, block, dim, grid};
    }
    do {
        for (size_t i = 0; i < n; i++) {
            running = &fibers[backwards ? n - 1 - i : i];
            if (running->is != RUNS) continue;
            here = &running->at;
            simulated_switch(&scheduler_sp, running->sp);
        }
    } while (release());
    for (const fiber &f : fibers)
        if (f.is != ENDED) return false;
    return true;
}

bool run_grid(const call &kernel, dim3 grid, dim3 dim, size_t shared) {
    const size_t n = (size_t)dim.x * dim.y * dim.z;
    if (n > n_stacks) {
        if (stacks) munmap(stacks, n_stacks * STACK);
        stacks = (char *)mmap(nullptr, n * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        n_stacks = n;
    }
    std::vector<char> room(shared + 128, (char)0xa5);
    dynamic_shared = (void *)(((uintptr_t)room.data() + 127) & ~(uintptr_t)127);
    body = &kernel;
    unsigned turn = 0;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++)
                if (!run_block({x, y, z}, grid, dim, turn++ % 2)) return false;
    return true;
}

static std::map<std::string, bind> &kernels() {
    static std::map<std::string, bind> all;
    return all;
}

void registrar::add(const char *name, bind make) { kernels()[name] = make; }

const bind *find_kernel(const char *name) {
    const auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

} // namespace simulated
