// Compiles a row pass once per instruction set: its file, RLAD_FILE, is included again with RLAD_ISA as the namespace to fill.
// Inside, the pass is in a nameless one, so that helpers of two files may have one name.
#pragma once

// Before any target is raised: code of these headers must run on every CPU, whichever file the linker takes it from.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "matrix.h"

#define RLAD_ISA generic
#define RLAD_VECTOR_BYTES 16  // which every 64-bit architecture has
#include "simd/all.h"
#include RLAD_FILE
#undef RLAD_ISA
#undef RLAD_VECTOR_BYTES

#if defined(__x86_64__)

#define RLAD_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define RLAD_PUSH_TARGET(isa) RLAD_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define RLAD_POP_TARGET RLAD_PRAGMA(clang attribute pop)
#else
#define RLAD_PUSH_TARGET(isa) RLAD_PRAGMA(GCC push_options) RLAD_PRAGMA(GCC target(isa))
#define RLAD_POP_TARGET RLAD_PRAGMA(GCC pop_options)
#endif

RLAD_PUSH_TARGET("avx2,fma")
#define RLAD_ISA avx2
#define RLAD_VECTOR_BYTES 32
#include "simd/all.h"
#include RLAD_FILE
#undef RLAD_ISA
#undef RLAD_VECTOR_BYTES
RLAD_POP_TARGET

RLAD_PUSH_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define RLAD_ISA avx512
#define RLAD_VECTOR_BYTES 64
#include "simd/all.h"
#include RLAD_FILE
#undef RLAD_ISA
#undef RLAD_VECTOR_BYTES
RLAD_POP_TARGET

#endif

namespace rlad {

template <class F, class... Same>
F of_current_isa(F generic, Same... higher) {
  const F by_level[] = {generic, higher...};
  return by_level[int(current_isa().level)];
}

}  // namespace rlad

// RLAD_PASS(fold<T>): the pass of the current instruction set. It does the rows, or whatever its op shares out, of [begin, end).
#if defined(__x86_64__)
#define RLAD_PASS(...) of_current_isa(&generic::__VA_ARGS__, &avx2::__VA_ARGS__, &avx512::__VA_ARGS__)
#else
#define RLAD_PASS(...) of_current_isa(&generic::__VA_ARGS__)
#endif
