#ifndef ZIGMA_INSTRUCTION_SETS_H
#define ZIGMA_INSTRUCTION_SETS_H

#include "kernels.h"

extern const zs_kernels zs_kernels_zen4, zs_kernels_avx512, zs_kernels_avx2, zs_kernels_sse2; /* x86-64 */
extern const zs_kernels zs_kernels_neon;                                                      /* arm64 */

/* The fastest variant that this CPU runs, or the named one; NULL if it does not run that. */
const zs_kernels *find_kernels(const char *name);

#endif
