// Packs bfloat16 operands with AVX512. Empty elsewhere.
#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12 sees it in its own immintrin.h
#endif
#include <immintrin.h>

#include "../bf16_product.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

namespace rlad::bf16 {

namespace {

#define RLAD_INLINE inline __attribute__((always_inline))

constexpr int64_t kTile = 16;  // vectors, and pairs, of a tile

int64_t clamp(int64_t n, int64_t most) { return n < 0 ? 0 : n > most ? most : n; }
uint32_t first_bits(int64_t n) { return uint32_t((uint64_t(1) << n) - 1); }

// Turns word (i, j) into word (j, i).
RLAD_INLINE void transpose(__m512i* w) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    w[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    w[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    w[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    w[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // w[4q + r] holds column r of each 128-bit lane for rows 4q … 4q + 3; what is left is a transposition of lanes
  for (int r = 0; r < 4; ++r) {
    t[r] = _mm512_shuffle_i32x4(w[r], w[4 + r], 0x88);
    t[4 + r] = _mm512_shuffle_i32x4(w[r], w[4 + r], 0xdd);
    t[8 + r] = _mm512_shuffle_i32x4(w[8 + r], w[12 + r], 0x88);
    t[12 + r] = _mm512_shuffle_i32x4(w[8 + r], w[12 + r], 0xdd);
  }
  for (int r = 0; r < 4; ++r) {
    w[r] = _mm512_shuffle_i32x4(t[r], t[8 + r], 0x88);
    w[8 + r] = _mm512_shuffle_i32x4(t[r], t[8 + r], 0xdd);
    w[4 + r] = _mm512_shuffle_i32x4(t[4 + r], t[12 + r], 0x88);
    w[12 + r] = _mm512_shuffle_i32x4(t[4 + r], t[12 + r], 0xdd);
  }
}

// A tile whose vectors lie along memory: word (vector, pair).
template <bool WHOLE>
RLAD_INLINE void load_deep(const Bf16Operand& x, int64_t v, int64_t k, __m512i* w) {
  const int64_t vectors = WHOLE ? kTile : clamp(x.size - v, kTile);
  const __mmask32 mask = WHOLE ? ~0u : first_bits(clamp(x.depth - k, kBf16Depth));
  for (int64_t i = 0; i < kTile; ++i) {
    w[i] = i < vectors ? _mm512_maskz_loadu_epi16(mask, x.data + (v + i) * x.stride + k) : _mm512_setzero_si512();
  }
}

// A tile whose vectors lie across memory: word (pair, vector).
template <bool WHOLE>
RLAD_INLINE void load_wide(const Bf16Operand& x, int64_t v, int64_t k, __m512i* w) {
  const __mmask16 mask = WHOLE ? 0xffff : __mmask16(first_bits(clamp(x.size - v, kTile)));
  const int64_t depth = WHOLE ? kBf16Depth : clamp(x.depth - k, kBf16Depth);
  const auto row = [&](int64_t i) {
    if (i >= depth) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x.data + (k + i) * x.stride + v));
  };
  for (int64_t i = 0; i < kTile; ++i) w[i] = _mm512_or_si512(row(2 * i), _mm512_slli_epi32(row(2 * i + 1), 16));
}

template <bool DEEP, bool WHOLE>
RLAD_INLINE void pack_tile(const Bf16Operand& x, bool is_b, int64_t v, int64_t k, uint16_t* to) {
  __m512i w[16];
  DEEP ? load_deep<WHOLE>(x, v, k, w) : load_wide<WHOLE>(x, v, k, w);
  if (is_b == DEEP) transpose(w);
  for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(to + i * kBf16Depth, w[i]);
}

template <bool DEEP>
void pack_step(const Bf16Operand& x, bool is_b, int64_t v, int64_t k, uint16_t* to) {
  const bool whole = v + kBf16Block <= x.size && k + kBf16Depth <= x.depth;
  for (int64_t end = v + kBf16Block; v < end; v += kTile, to += kTile * kBf16Depth) {
    whole ? pack_tile<DEEP, true>(x, is_b, v, k, to) : pack_tile<DEEP, false>(x, is_b, v, k, to);
  }
}

}  // namespace

// In the order in which x lies in memory.
void pack(const Bf16Operand& x, bool is_b, int64_t v0, int64_t v1, int64_t k0, int64_t steps, uint16_t* to) {
  const auto at = [&](int64_t v, int64_t s) { return to + (v - v0) * steps * kBf16Depth + s * kBf16Step; };
  if (x.deep) {
    for (int64_t v = v0; v < v1; v += kBf16Block) {
      for (int64_t s = 0; s < steps; ++s) pack_step<true>(x, is_b, v, k0 + s * kBf16Depth, at(v, s));
    }
  } else {
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t v = v0; v < v1; v += kBf16Block) pack_step<false>(x, is_b, v, k0 + s * kBf16Depth, at(v, s));
    }
  }
}

}  // namespace rlad::bf16
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
