/* What the table knows of one expert, in a word: pins in bits 0-31, state in 32-34, member of the pinned set in 35,
 * slot in 40-63. */
#ifndef MER_CACHE_WORD_H
#define MER_CACHE_WORD_H

#include "mer_cache.h"

#include <stdatomic.h>

#define PIN ((uint64_t)1)
#define PINS ((uint64_t)0xffffffff)
#define STATE(s) ((uint64_t)(s) << 32)
#define STATE_MASK STATE(7)
#define PROTECTED ((uint64_t)1 << 35)
#define SLOT_SHIFT 40

typedef _Atomic uint64_t word;

static inline int state_of(uint64_t w) { return (int)((w & STATE_MASK) >> 32); }
static inline int64_t slot_of(uint64_t w) { return (int64_t)(w >> SLOT_SHIFT); }
static inline uint64_t with_state(uint64_t w, int state) { return (w & ~STATE_MASK) | STATE(state); }
static inline int evictable(uint64_t w) {
    return (w & (PINS | PROTECTED | STATE_MASK)) == STATE(MER_STATE_RESIDENT);
}

#endif
