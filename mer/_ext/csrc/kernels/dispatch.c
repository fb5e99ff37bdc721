/* Which instruction sets can run here: what the CPU has and the operating system keeps. */
#define _GNU_SOURCE
#include "../mer_kernels.h"

#define HAS(word, bit) (((word) >> (bit)) & 1u)

int mer_isas_for(const mer_cpuid *cpu, const mer_isa **out, int room) {
    int n = 0;
#if defined(__x86_64__)
    const int ymm_kept = HAS(cpu->leaf1_ecx, 27) && (cpu->xcr0 & 0x06) == 0x06;
    const int avx2 = ymm_kept && HAS(cpu->leaf1_ecx, 28) && HAS(cpu->leaf1_ecx, 12) /* FMA */
                     && HAS(cpu->leaf1_ecx, 29) /* F16C */ && HAS(cpu->leaf7_ebx, 5);
    const int avxvnni = avx2 && HAS(cpu->leaf7_1_eax, 4);
    /* leaf 7: F, DQ, BW, VL and VNNI */
    const int avx512 = avx2 && (cpu->xcr0 & 0xe0) == 0xe0 && HAS(cpu->leaf7_ebx, 16) && HAS(cpu->leaf7_ebx, 17)
                       && HAS(cpu->leaf7_ebx, 30) && HAS(cpu->leaf7_ebx, 31) && HAS(cpu->leaf7_ecx, 11);
    /* the tiles' configuration and their data; TILE, INT8 and BF16 */
    const int amx = avx512 && (cpu->xcr0 & 0x60000) == 0x60000 && HAS(cpu->leaf7_edx, 24) && HAS(cpu->leaf7_edx, 25)
                    && HAS(cpu->leaf7_edx, 22) && cpu->tiles_allowed;
    if (amx && n < room) out[n++] = &mer_isa_amx;
    if (avx512 && n < room) out[n++] = &mer_isa_avx512;
    if (avxvnni && n < room) out[n++] = &mer_isa_avxvnni;
    if (avx2 && n < room) out[n++] = &mer_isa_avx2;
#else
    (void)cpu;
#endif
    if (n < room) out[n++] = &mer_isa_scalar;
    return n;
}

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Linux gives a process the tiles' 8 KiB of state on request; older kernels know neither the one nor the other. */
static int allow_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
#ifdef SYS_arch_prctl
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
    return 0;
#endif
}

static mer_cpuid this_cpu(void) {
    mer_cpuid cpu = {0};
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) cpu.leaf1_ecx = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        cpu.leaf7_ebx = b;
        cpu.leaf7_ecx = c;
        cpu.leaf7_edx = d;
    }
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.leaf7_1_eax = a;
    if (HAS(cpu.leaf1_ecx, 27)) {
        __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
        cpu.xcr0 = a;
    }
    if (HAS(cpu.leaf7_edx, 24)) cpu.tiles_allowed = allow_tiles();
    return cpu;
}
#else
static mer_cpuid this_cpu(void) { return (mer_cpuid){0}; }
#endif

int mer_isas(const mer_isa **out, int room) {
    const mer_cpuid cpu = this_cpu();
    return mer_isas_for(&cpu, out, room);
}
