/* The tile instructions of AMX that amx.c uses. Assembler, because the compilers' own forms do not say that they
 * read and write memory. MER_TILES names a header that does the same in C (tests/soft_tiles.h). */
#ifndef MER_TILES_H
#define MER_TILES_H

#include <stdint.h>

/* The operand of LDTILECFG: palette 1, and for each of the eight tiles its rows and the bytes of a row. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} mer_tile_config;

#ifdef MER_TILES
#include MER_TILES
#else
#define tile_configure(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(config)) : "memory")
#define tile_release() __asm__ volatile("tilerelease" ::: "memory")
#define tile_zero(t) __asm__ volatile("tilezero %%tmm" #t ::: "memory")
#define tile_load(t, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"((const void *)(from)), "r"((long)(stride)) : "memory")
#define tile_store(t, to, stride) \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"((void *)(to)), "r"((long)(stride)) : "memory")
/* sums += a b: bytes with sign in fours, BF16 in pairs */
#define tile_dot_int8(sums, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #sums ::: "memory")
#define tile_dot_bf16(sums, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sums ::: "memory")
#endif

#endif
