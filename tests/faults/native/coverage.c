/* Preloaded into the process that fuzzes: what the core ran through, and guard pages.
 *
 * The core is compiled with gcc's -fsanitize-coverage=trace-pc, which calls the first function below
 * in each basic block. Pairs of blocks are counted, of the thread that fuzzes only.
 *
 * A shared mapping lies between two inaccessible regions: an access out of its bounds faults, where
 * it would else hit a neighbour (AddressSanitizer knows nothing of mappings).
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

enum { SIZE = 1 << 16, GUARD = 1 << 18, MAPPINGS = 64 };

static uint8_t cover_counters[SIZE];
static uint8_t seen[SIZE];
static __thread int on;
static __thread uintptr_t before;

void __sanitizer_cov_trace_pc(void) {
    uintptr_t pc = (uintptr_t)__builtin_return_address(0);
    uint8_t *counter = &cover_counters[(pc ^ before) & (SIZE - 1)];
    if (!on)
        return;
    before = pc >> 1;
    if (*counter != 255)
        ++*counter;
}

void cover(int yes) {
    on = yes;
    before = 0;
}

/* How many counters have an order of magnitude that was never seen; they are then seen, and 0. */
int cover_new(void) {
    int found = 0;
    for (int i = 0; i < SIZE; i += 8) {
        uint64_t word;
        memcpy(&word, cover_counters + i, 8);
        if (!word)
            continue;
        for (int j = i; j < i + 8; ++j) {
            uint8_t bit = cover_counters[j] ? 1 << (31 - __builtin_clz(cover_counters[j])) : 0;
            found += (bit & ~seen[j]) != 0;
            seen[j] |= bit;
        }
        memset(cover_counters + i, 0, 8);
    }
    return found;
}

int cover_total(void) {
    int total = 0;
    for (int i = 0; i < SIZE; ++i)
        total += seen[i] != 0;
    return total;
}

static struct {
    char *base;
    size_t size;
} guarded[MAPPINGS];

void *mmap(void *addr, size_t size, int prot, int flags, int fd, off_t offset) {
    size_t whole = (size + 4095) & ~(size_t)4095;
    char *room;
    int i;
    if (addr == NULL && fd >= 0 && (flags & MAP_SHARED))
        for (i = 0; i < MAPPINGS; ++i) {
            if (__atomic_load_n(&guarded[i].base, __ATOMIC_ACQUIRE))
                continue;
            room = (char *)syscall(SYS_mmap, NULL, whole + 2 * GUARD, PROT_NONE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (room == MAP_FAILED)
                break;
            guarded[i].size = whole;
            guarded[i].base = room + GUARD;
            addr = room + GUARD;
            flags |= MAP_FIXED;
            break;
        }
    return (void *)syscall(SYS_mmap, addr, size, prot, flags, fd, offset);
}

int munmap(void *addr, size_t size) {
    for (int i = 0; i < MAPPINGS; ++i)
        if (addr != NULL && guarded[i].base == addr) {
            size_t whole = guarded[i].size + 2 * GUARD;
            guarded[i].base = NULL;
            return (int)syscall(SYS_munmap, (char *)addr - GUARD, whole);
        }
    return (int)syscall(SYS_munmap, addr, size);
}
