/* States, pins and eviction. See mer_cache.h.
 *
 * One mutex guards what only misses need: the free slots, who owns a slot, and the step from absent to
 * loading. So a missing expert has one loader; hits, publishing and releasing only touch the expert's word.
 *
 * Order of memory: publishing is a release and acquiring an acquire, so a hit sees the bytes that were read.
 * Dropping a pin is a release and evicting an acquire, so a slot is overwritten after its last reader left. */
#include "next_use.h"
#include "prefault.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#define NO_EXPERT ((int64_t)-1)
#define RETIRED ((int64_t)-2) /* the slot is out of service */
#define LINE 64
#define NEAR_SLOTS 8 /* that are touched before they are used even while the processors are wanted */

typedef _Atomic int64_t counter;

struct mer_cache {
    word *words;  /* [n_experts] */
    word *keys;   /* [n_slots] when the slot was last used */
    next_use *next_use; /* NULL: LRU; under the mutex */
    int64_t *owner; /* [n_slots] expert, NO_EXPERT or RETIRED; under the mutex */
    int64_t *free_slots, *retired; /* [n_slots] two stacks */
    int64_t n_free, n_retired, n_layers, n_experts, n_slots;
    int64_t used; /* no slot from here on was ever used */
    int policy, ahead; /* ahead: memory was touched also where no slot was used */
    char *arena;
    size_t arena_bytes;
    size_t slot_bytes;
    int huge;
    prefault *prefault; /* NULL: memory is touched when it is read into */
    pthread_mutex_t mutex;
    _Alignas(LINE) _Atomic uint64_t clock;
    _Alignas(LINE) counter hits; /* apart from the others: written on the hit path */
    _Alignas(LINE) counter misses, busy, full, evictions, failures;
};

static inline int swap(word *w, uint64_t *seen, uint64_t to, memory_order order) {
    return atomic_compare_exchange_weak_explicit(w, seen, to, order, memory_order_relaxed);
}

static inline void add(counter *n) { atomic_fetch_add_explicit(n, 1, memory_order_relaxed); }

/* The expert in this slot is used. */
static inline void touch(mer_cache *c, int64_t slot) {
    const uint64_t now = atomic_fetch_add_explicit(&c->clock, 1, memory_order_relaxed);
    atomic_store_explicit(&c->keys[slot], now, memory_order_relaxed);
}

/* ---- an arena that starts on a huge page ---- */

static char *map_arena(size_t bytes, int huge, int *accepted) {
    const size_t big = (size_t)2 << 20;
    char *p = mmap(NULL, bytes + big, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return NULL;
    const size_t lead = (big - (uintptr_t)p % big) % big;
    if (lead) munmap(p, lead);
    munmap(p + lead + bytes, big - lead);
    p += lead;
    *accepted = madvise(p, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) == 0 && huge;
    return p;
}

mer_cache *mer_cache_new(int64_t n_layers, int64_t n_experts, int64_t n_slots, size_t slot_bytes, int policy,
                         int huge) {
    if (n_layers < 1 || n_experts < 1 || n_experts % n_layers || n_slots < 1 || n_slots > MER_CACHE_MAX_SLOTS || !slot_bytes || slot_bytes % 4096
        || slot_bytes > (SIZE_MAX >> 1) / (size_t)n_slots) {
        errno = EINVAL;
        return NULL;
    }
    mer_cache *c = aligned_alloc(LINE, sizeof(mer_cache)); /* its size is a multiple of LINE: it holds lines */
    if (!c) return NULL;
    *c = (mer_cache){.n_layers = n_layers, .n_experts = n_experts, .n_slots = n_slots, .n_free = n_slots, .policy = policy};
    pthread_mutex_init(&c->mutex, NULL);
    c->arena_bytes = (size_t)n_slots * slot_bytes;
    c->slot_bytes = slot_bytes;
    c->words = calloc((size_t)n_experts, sizeof *c->words);
    c->keys = calloc((size_t)n_slots, sizeof *c->keys);
    c->owner = malloc((size_t)n_slots * sizeof *c->owner);
    c->free_slots = malloc((size_t)n_slots * sizeof *c->free_slots);
    c->retired = malloc((size_t)n_slots * sizeof *c->retired);
    const int choose = policy == MER_CACHE_NEXT_USE && n_slots < n_experts; /* else nobody is ever evicted */
    if (choose) c->next_use = next_use_new(n_layers, n_experts / n_layers);
    if (c->words && c->keys && c->owner && c->free_slots && c->retired && (!choose || c->next_use))
        c->arena = map_arena(c->arena_bytes, huge, &c->huge);
    if (!c->arena) {
        mer_cache_free(c);
        errno = ENOMEM;
        return NULL;
    }
    for (int64_t i = 0; i < n_slots; i++) {
        c->owner[i] = NO_EXPERT;
        c->free_slots[i] = n_slots - 1 - i;
    }
    return c;
}

void mer_cache_free(mer_cache *c) {
    if (!c) return;
    prefault_stop(c->prefault);
    if (c->arena) munmap(c->arena, c->arena_bytes);
    pthread_mutex_destroy(&c->mutex);
    next_use_free(c->next_use);
    free(c->words);
    free(c->keys);
    free(c->owner);
    free(c->free_slots);
    free(c->retired);
    free(c);
}

char *mer_cache_arena(const mer_cache *c) { return c->arena; }
int mer_cache_huge_pages(const mer_cache *c) { return c->huge; }

int mer_cache_prefault(mer_cache *c, size_t ahead) {
    c->ahead = 1;
    int64_t end = c->n_slots; /* those that are out of service are the last ones */
    while (end && c->owner[end - 1] == RETIRED) end--;
    if (!c->prefault) c->prefault = prefault_start(c->arena, (size_t)end * c->slot_bytes, ahead, NEAR_SLOTS * c->slot_bytes);
    return c->prefault ? 0 : -1;
}

void mer_cache_hold_prefault(mer_cache *c, int on) {
    if (c->prefault) prefault_hold(c->prefault, on);
}

/* ---- under the mutex ---- */

static int may_go(const mer_cache *c, int64_t slot) {
    if (c->owner[slot] < 0) return 0;
    return evictable(atomic_load_explicit(&c->words[c->owner[slot]], memory_order_relaxed));
}

/* The expert leaves its slot, which stays the caller's. 0: somebody pinned it first. */
static int evict(mer_cache *c, int64_t slot) {
    word *const w = &c->words[c->owner[slot]];
    uint64_t seen = atomic_load_explicit(w, memory_order_relaxed);
    do {
        if (!evictable(seen)) return 0;
    } while (!swap(w, &seen, with_state(seen, MER_STATE_EVICTING), memory_order_acquire));
    c->owner[slot] = NO_EXPERT;
    /* By now it may have been put into the pinned set, which is no bar: it may be so while absent, too. */
    seen = atomic_load_explicit(w, memory_order_relaxed);
    while (!swap(w, &seen, seen & PROTECTED, memory_order_release))
        ;
    return 1;
}

/* The slot used longest ago: an expert's word is looked at only where the key is the least so far. */
static int64_t least_recent(const mer_cache *c) {
    uint64_t least = UINT64_MAX;
    int64_t best = -1;
    for (int64_t i = 0; i < c->used; i++) {
        const uint64_t key = atomic_load_explicit(&c->keys[i], memory_order_relaxed);
        if (key < least && may_go(c, i)) {
            least = key;
            best = i;
        }
    }
    return best;
}

/* The slot that is to be made free, or -1: none may. For an expert that is asked for early, only one whose expert is
 * expected later. */
static int64_t find_victim(const mer_cache *c, int64_t expert, int early) {
    if (!c->next_use) return least_recent(c);
    const double later_than = early ? next_use_in(c->next_use, expert) : 0;
    const int64_t victim = next_use_victim(c->next_use, c->words, later_than);
    return victim < 0 ? -1 : slot_of(atomic_load_explicit(&c->words[victim], memory_order_relaxed));
}

static int64_t take_slot(mer_cache *c, int64_t expert, int early) {
    if (c->n_free) { /* the lowest that was never used, or one that was */
        const int64_t slot = c->free_slots[--c->n_free];
        if (slot >= c->used) c->used = slot + 1;
        if (c->prefault) prefault_reach(c->prefault, (size_t)(slot + 1) * c->slot_bytes);
        return slot;
    }
    for (;;) {
        const int64_t slot = find_victim(c, expert, early);
        if (slot < 0) return -1;
        if (evict(c, slot)) {
            add(&c->evictions);
            return slot;
        }
    }
}

static void give_slot(mer_cache *c, int64_t slot) {
    c->owner[slot] = NO_EXPERT;
    c->free_slots[c->n_free++] = slot;
}

/* Absent to loading. 0: somebody else was quicker. */
static int start_loading(mer_cache *c, int64_t expert, int early, int64_t *slot, int *result) {
    word *const w = &c->words[expert];
    pthread_mutex_lock(&c->mutex);
    uint64_t seen = atomic_load_explicit(w, memory_order_relaxed);
    const int absent = state_of(seen) == MER_STATE_ABSENT;
    if (absent) {
        const int64_t taken = take_slot(c, expert, early);
        *result = taken < 0 ? MER_ACQ_FULL : MER_ACQ_MISS;
        if (taken >= 0) {
            c->owner[taken] = expert;
            touch(c, taken);
            if (c->next_use) next_use_admit(c->next_use, expert);
            const uint64_t to = ((uint64_t)taken << SLOT_SHIFT) | STATE(MER_STATE_LOADING) | PIN;
            while (!swap(w, &seen, to | (seen & PROTECTED), memory_order_relaxed))
                ;
            *slot = taken;
        }
    }
    pthread_mutex_unlock(&c->mutex);
    return absent;
}

/* ---- what callers do ---- */

void mer_cache_visit(mer_cache *c, int64_t layer, const int32_t *ids, int64_t n, int64_t tokens) {
    if (!c->next_use) return;
    pthread_mutex_lock(&c->mutex);
    next_use_visit(c->next_use, layer, ids, n, tokens);
    pthread_mutex_unlock(&c->mutex);
}

static int acquire(mer_cache *c, int64_t expert, int early, int64_t *slot) {
    word *const w = &c->words[expert];
    uint64_t seen = atomic_load_explicit(w, memory_order_relaxed);
    for (;;) {
        const int state = state_of(seen);
        int result = MER_ACQ_HIT;
        uint64_t to = seen + PIN;
        if (state == MER_STATE_LOADING) {
            result = MER_ACQ_BUSY;
        } else if (state == MER_STATE_FAILED) { /* others who wait for it keep the slot: read into it again */
            result = MER_ACQ_MISS;
            to = with_state(to, MER_STATE_LOADING);
        } else if (state != MER_STATE_RESIDENT) {
            if (start_loading(c, expert, early, slot, &result)) {
                add(result == MER_ACQ_MISS ? &c->misses : &c->full);
                return result;
            }
            seen = atomic_load_explicit(w, memory_order_relaxed);
            continue;
        }
        if (!swap(w, &seen, to, memory_order_acquire)) continue;
        *slot = slot_of(to);
        touch(c, *slot);
        add(result == MER_ACQ_HIT ? &c->hits : result == MER_ACQ_MISS ? &c->misses : &c->busy);
        return result;
    }
}

int mer_cache_acquire(mer_cache *c, int64_t expert, int64_t *slot) { return acquire(c, expert, 0, slot); }

int mer_cache_acquire_early(mer_cache *c, int64_t expert, int64_t *slot) {
    if (c->next_use) {
        pthread_mutex_lock(&c->mutex);
        next_use_expect(c->next_use, expert);
        pthread_mutex_unlock(&c->mutex);
    }
    return acquire(c, expert, 1, slot);
}

static int end_loading(mer_cache *c, int64_t expert, int state) {
    word *const w = &c->words[expert];
    uint64_t seen = atomic_load_explicit(w, memory_order_relaxed);
    do {
        if (state_of(seen) != MER_STATE_LOADING) return -1;
    } while (!swap(w, &seen, with_state(seen, state), memory_order_release));
    return 0;
}

int mer_cache_publish(mer_cache *c, int64_t expert) { return end_loading(c, expert, MER_STATE_RESIDENT); }

int mer_cache_fail(mer_cache *c, int64_t expert) {
    if (end_loading(c, expert, MER_STATE_FAILED)) return -1;
    add(&c->failures);
    return 0;
}

int mer_cache_release(mer_cache *c, int64_t expert) {
    word *const w = &c->words[expert];
    uint64_t seen = atomic_load_explicit(w, memory_order_relaxed);
    for (;;) {
        const int last = (seen & PINS) == PIN, state = state_of(seen);
        if (!(seen & PINS) || (last && state == MER_STATE_LOADING)) return -1;
        if (!last || state != MER_STATE_FAILED) {
            if (swap(w, &seen, seen - PIN, memory_order_release)) return 0;
            continue;
        }
        /* The last one to know of a failed read: the slot is free again. */
        pthread_mutex_lock(&c->mutex);
        const int gone = swap(w, &seen, seen & PROTECTED, memory_order_acq_rel);
        if (gone) give_slot(c, slot_of(seen));
        pthread_mutex_unlock(&c->mutex);
        if (gone) return 0;
    }
}

int mer_cache_state(const mer_cache *c, int64_t expert) {
    return state_of(atomic_load_explicit(&c->words[expert], memory_order_acquire));
}

int64_t mer_cache_pins(const mer_cache *c, int64_t expert) {
    return (int64_t)(atomic_load_explicit(&c->words[expert], memory_order_relaxed) & PINS);
}

void mer_cache_protect(mer_cache *c, int64_t expert, int on) {
    if (on)
        atomic_fetch_or_explicit(&c->words[expert], PROTECTED, memory_order_relaxed);
    else
        atomic_fetch_and_explicit(&c->words[expert], ~PROTECTED, memory_order_relaxed);
}

int64_t mer_cache_clear(mer_cache *c) {
    int64_t dropped = 0;
    pthread_mutex_lock(&c->mutex);
    for (int64_t slot = 0; slot < c->n_slots; slot++)
        if (may_go(c, slot) && evict(c, slot)) {
            give_slot(c, slot);
            dropped++;
        }
    pthread_mutex_unlock(&c->mutex);
    return dropped;
}

int mer_cache_drop(mer_cache *c, int64_t expert) {
    int dropped = 0;
    pthread_mutex_lock(&c->mutex);
    const uint64_t seen = atomic_load_explicit(&c->words[expert], memory_order_relaxed);
    if (state_of(seen) == MER_STATE_RESIDENT && may_go(c, slot_of(seen)) && evict(c, slot_of(seen))) {
        give_slot(c, slot_of(seen));
        dropped = 1;
    }
    pthread_mutex_unlock(&c->mutex);
    return dropped;
}

/* Out of service, with its memory given back. */
static void retire(mer_cache *c, int64_t slot) {
    if (slot < c->used || c->ahead) madvise(c->arena + (size_t)slot * c->slot_bytes, c->slot_bytes, MADV_DONTNEED);
    c->owner[slot] = RETIRED;
    c->retired[c->n_retired++] = slot;
}

/* Slots of the free stack's bottom, which were used last or never. */
static void retire_free(mer_cache *c, int64_t n) {
    if (n > c->n_free) n = c->n_free;
    for (int64_t i = 0; i < n; i++) retire(c, c->free_slots[i]);
    c->n_free -= n;
    for (int64_t i = 0; i < c->n_free; i++) c->free_slots[i] = c->free_slots[i + n];
}

int64_t mer_cache_resize(mer_cache *c, int64_t n) {
    pthread_mutex_lock(&c->mutex);
    prefault_stop(c->prefault);
    c->prefault = NULL;
    while (c->n_slots - c->n_retired < n) give_slot(c, c->retired[--c->n_retired]);
    retire_free(c, c->n_slots - c->n_retired - n);
    while (c->n_slots - c->n_retired > n) {
        const int64_t slot = find_victim(c, 0, 0);
        if (slot < 0) break;
        if (!evict(c, slot)) continue;
        add(&c->evictions);
        retire(c, slot);
    }
    /* Only now: as long as everything was there, nobody kept account of anything but the last use. */
    if (c->policy == MER_CACHE_NEXT_USE && !c->next_use && n < c->n_experts)
        c->next_use = next_use_new(c->n_layers, c->n_experts / c->n_layers);
    const int64_t left = c->n_slots - c->n_retired;
    pthread_mutex_unlock(&c->mutex);
    return left;
}

int mer_cache_all_protected(mer_cache *c) {
    pthread_mutex_lock(&c->mutex);
    int all = !c->n_free;
    for (int64_t slot = 0; all && slot < c->n_slots; slot++) {
        if (c->owner[slot] == RETIRED) continue;
        const uint64_t w = atomic_load_explicit(&c->words[c->owner[slot]], memory_order_relaxed);
        all = (w & (PROTECTED | STATE_MASK)) == (PROTECTED | STATE(MER_STATE_RESIDENT));
    }
    pthread_mutex_unlock(&c->mutex);
    return all;
}

/* ---- what is remembered from one run to the next ---- */

void mer_cache_chances(mer_cache *c, double *chances) {
    pthread_mutex_lock(&c->mutex);
    for (int64_t e = 0; e < c->n_experts; e++)
        chances[e] = mer_cache_state(c, e) != MER_STATE_RESIDENT ? -1 : c->next_use ? next_use_chance(c->next_use, e) : 1;
    pthread_mutex_unlock(&c->mutex);
}

void mer_cache_remember(mer_cache *c, int64_t expert, double chance) {
    if (!c->next_use) return;
    pthread_mutex_lock(&c->mutex);
    next_use_remember(c->next_use, expert, chance);
    pthread_mutex_unlock(&c->mutex);
}

int64_t mer_cache_free_slots(mer_cache *c) {
    pthread_mutex_lock(&c->mutex);
    const int64_t n = c->n_free;
    pthread_mutex_unlock(&c->mutex);
    return n;
}

/* ---- statistics ---- */

void mer_cache_get_stats(const mer_cache *c, mer_cache_stats *out) {
    out->hits = atomic_load_explicit(&c->hits, memory_order_relaxed);
    out->misses = atomic_load_explicit(&c->misses, memory_order_relaxed);
    out->busy = atomic_load_explicit(&c->busy, memory_order_relaxed);
    out->full = atomic_load_explicit(&c->full, memory_order_relaxed);
    out->evictions = atomic_load_explicit(&c->evictions, memory_order_relaxed);
    out->failures = atomic_load_explicit(&c->failures, memory_order_relaxed);
}

void mer_cache_reset_stats(mer_cache *c) {
    counter *const all[] = {&c->hits, &c->misses, &c->busy, &c->full, &c->evictions, &c->failures};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) atomic_store_explicit(all[i], 0, memory_order_relaxed);
}

void mer_cache_count(const mer_cache *c, mer_cache_census *out) {
    *out = (mer_cache_census){0};
    for (int64_t e = 0; e < c->n_experts; e++) {
        const uint64_t w = atomic_load_explicit(&c->words[e], memory_order_relaxed);
        out->resident += state_of(w) == MER_STATE_RESIDENT;
        out->loading += state_of(w) == MER_STATE_LOADING;
        out->failed += state_of(w) == MER_STATE_FAILED;
        out->in_use += (w & PINS) != 0;
        out->pinned_set += (w & PROTECTED) != 0;
    }
}
