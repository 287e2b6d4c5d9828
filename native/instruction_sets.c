/* Choice of the variant of the kernels: the fastest that the processor and the operating system run. */
#include "instruction_sets.h"

#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)

#include <cpuid.h>

static int os_saves_state(uint64_t mask) { /* XCR0: which registers the operating system keeps */
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (((uint64_t)high << 32 | low) & mask) == mask;
}

/* AVX-512 for Zen 4 and later. Others may run it as well, slower than the plain one: it is a question of units, not of
 * instructions alone, so the maker is asked for. */
static int is_zen4(void) {
    uint32_t eax, maker[3];
    if (!__get_cpuid(0, &eax, &maker[0], &maker[2], &maker[1]) || memcmp(maker, "AuthenticAMD", 12)) return 0;
    uint32_t ebx, ecx, edx;
    const uint32_t bf16 = 1u << 5;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax & bf16;
}

static int supports(const zs_kernels *kernels) {
    uint32_t eax, ebx, ecx, edx;
    const uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    const uint32_t avx2 = 1u << 5, bmi = 1u << 3 | 1u << 8;
    const uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31; /* F, DQ, CD, BW, VL */
    if (kernels == &zs_kernels_sse2) return 1;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
    if ((ecx & (fma | osxsave | avx | f16c)) != (fma | osxsave | avx | f16c) || !os_saves_state(0x6)) return 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (ebx & (avx2 | bmi)) != (avx2 | bmi)) return 0;
    if (kernels == &zs_kernels_avx2) return 1;
    if ((ebx & avx512) != avx512 || !os_saves_state(0xe6)) return 0;
    return kernels == &zs_kernels_avx512 || is_zen4();
}

static const zs_kernels *const variants[] = {&zs_kernels_zen4, &zs_kernels_avx512, &zs_kernels_avx2, &zs_kernels_sse2};

#else

static int supports(const zs_kernels *kernels) { return kernels == &zs_kernels_neon; }
static const zs_kernels *const variants[] = {&zs_kernels_neon};

#endif

/* Bit i: variants[i] runs here. Asked of the processor once: under a hypervisor every CPUID leaves the guest, which
 * takes longer than a small scan. Threads that ask at the same time find the same. */
static unsigned supported(void) {
    static _Atomic unsigned known;
    const unsigned asked = 1u << 31;
    unsigned set = atomic_load_explicit(&known, memory_order_relaxed);
    if (!set) {
        set = asked;
        for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
            if (supports(variants[i])) set |= 1u << i;
        atomic_store_explicit(&known, set, memory_order_relaxed);
    }
    return set;
}

const zs_kernels *find_kernels(const char *name) {
    const unsigned set = supported();
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
        if (set >> i & 1 && (!name || !*name || !strcmp(name, variants[i]->name))) return variants[i];
    return NULL;
}
