/* The expert cache: an arena of equal slots, and a table with one atomic word per expert.
 *
 *   absent -> loading -> resident -> evicting -> absent
 *                 \-> failed -> absent (with the last pin), or loading again (whoever acquires it first)
 *
 * A pinned expert keeps its slot and its bytes. Every function may be called by several threads at once
 * unless it says otherwise; a hit takes no lock. Experts are in [0, n_experts): not checked here. */
#ifndef MER_CACHE_H
#define MER_CACHE_H

#include <stddef.h>
#include <stdint.h>

enum mer_acquired {
    MER_ACQ_HIT,  /* resident; pinned */
    MER_ACQ_MISS, /* a slot is reserved, pinned: read into it, then publish, or fail and release */
    MER_ACQ_BUSY, /* somebody else is reading it; pinned: wait until its state is no longer loading */
    MER_ACQ_FULL, /* every slot is in use or in the pinned set: nothing was taken */
};

enum mer_expert_state {
    MER_STATE_ABSENT,
    MER_STATE_LOADING,
    MER_STATE_RESIDENT,
    MER_STATE_EVICTING,
    MER_STATE_FAILED, /* its read failed; lasts until those who waited for it have released it */
};

enum mer_cache_policy {
    MER_CACHE_LRU,      /* evict what was acquired longest ago */
    MER_CACHE_NEXT_USE, /* evict what is expected to be wanted last: csrc/cache/next_use.c */
};

typedef struct mer_cache mer_cache;

typedef struct {
    int64_t hits;      /* acquired resident */
    int64_t misses;    /* acquired to be read */
    int64_t busy;      /* acquired while somebody else was reading it */
    int64_t full;      /* refused */
    int64_t evictions;
    int64_t failures;  /* reads that failed */
} mer_cache_stats;

typedef struct {
    int64_t resident, loading, failed; /* experts in that state */
    int64_t in_use;                    /* experts with at least one pin */
    int64_t pinned_set;                /* experts that mer_cache_protect named, resident or not */
} mer_cache_census;

enum { MER_CACHE_MAX_SLOTS = 1 << 24 };

/* slot_bytes is a multiple of 4096, 1 <= n_slots <= MER_CACHE_MAX_SLOTS: as many as there can ever be. The arena (n_slots * slot_bytes)
 * starts on a 2 MiB boundary; memory is taken page by page as slots are first written. With huge, huge pages
 * are asked for, else refused. NULL and errno when there is no memory. Expert e of layer l of n_layers is number
 * l * n_experts / n_layers + e. */
mer_cache *mer_cache_new(int64_t n_layers, int64_t n_experts, int64_t n_slots, size_t slot_bytes, int policy,
                         int huge);
void mer_cache_free(mer_cache *c); /* NULL is allowed; nobody may be using it */
char *mer_cache_arena(const mer_cache *c);
int mer_cache_huge_pages(const mer_cache *c); /* whether the kernel accepted the wish for huge pages */

/* How many slots there are from now on, 1 <= n <= those of mer_cache_new: returns how many that is. Of slots that go, the
 * memory is given back, and their experts are gone; the policy chooses them. More remain where experts are in use or
 * in the pinned set: try again later. Ends the touching of memory ahead of its use.
 * By the thread that visits. */
int64_t mer_cache_resize(mer_cache *c, int64_t n);

/* Touches the arena's memory before it is needed, in the background, never more than `ahead` bytes beyond the slots that
 * were used so far. Before others use the cache. 0, or -1: it can't. */
int mer_cache_prefault(mer_cache *c, size_t ahead);
/* Only a few slots ahead (on): the processors are wanted. By one thread at a time. */
void mer_cache_hold_prefault(mer_cache *c, int on);

/* Returns enum mer_acquired; *slot is set unless it is MER_ACQ_FULL. */
int mer_cache_acquire(mer_cache *c, int64_t expert, int64_t *slot);
/* The same for an expert that is likely to be wanted at its layer's next turn: until then it counts as wanted, and
 * nothing that is expected as soon makes room for it: MER_ACQ_FULL instead. With LRU as mer_cache_acquire. */
int mer_cache_acquire_early(mer_cache *c, int64_t expert, int64_t *slot);
/* The turn of a layer, told before its experts are acquired: `tokens` tokens chose ids[n], numbers in the layer. */
void mer_cache_visit(mer_cache *c, int64_t layer, const int32_t *ids, int64_t n, int64_t tokens);
/* By the one who got MER_ACQ_MISS, once its read has ended; the pin stays. 0, or -1: it was not loading. */
int mer_cache_publish(mer_cache *c, int64_t expert);
int mer_cache_fail(mer_cache *c, int64_t expert);
/* Drops one pin. 0, or -1: it had none, or it was the last while loading (its loader publishes or fails first). */
int mer_cache_release(mer_cache *c, int64_t expert);
/* enum mer_expert_state. Resident: whoever holds a pin may read the slot. */
int mer_cache_state(const mer_cache *c, int64_t expert);
int64_t mer_cache_pins(const mer_cache *c, int64_t expert);

/* Puts an expert into the pinned set (on) or takes it out: once resident, a member is never evicted. */
void mer_cache_protect(mer_cache *c, int64_t expert, int on);
/* Drops every resident expert that is neither in use nor in the pinned set; returns how many. */
int64_t mer_cache_clear(mer_cache *c);
/* Drops this one, if it is such; returns whether it did. */
int mer_cache_drop(mer_cache *c, int64_t expert);
/* Whether every slot holds a resident member of the pinned set: MER_ACQ_FULL then lasts until one is taken out. */
int mer_cache_all_protected(mer_cache *c);

/* chances[n_experts]: of a resident expert, the chance that a token wants it (1 where nobody keeps account), else -1. */
void mer_cache_chances(mer_cache *c, double *chances);
/* What such a chance was before; in (0, 1]. */
void mer_cache_remember(mer_cache *c, int64_t expert, double chance);
/* Slots that hold nothing. */
int64_t mer_cache_free_slots(mer_cache *c);

void mer_cache_get_stats(const mer_cache *c, mer_cache_stats *out);
void mer_cache_reset_stats(mer_cache *c);
void mer_cache_count(const mer_cache *c, mer_cache_census *out); /* exact while nobody else is at work */

#endif
