// Row passes for x86-64 with AVX2. Empty elsewhere.
#include "system.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define RLAD_ISA avx2
#define RLAD_VECTOR_BYTES 32
#include "variant.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
