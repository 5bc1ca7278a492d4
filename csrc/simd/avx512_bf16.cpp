// The bfloat16 product with AVX512-BF16. Empty elsewhere than on x86-64.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "../bf16_product.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define RLAD_ISA avx512_bf16
#include "bf16_panel.h"

namespace rlad::avx512_bf16 {

namespace {

constexpr int64_t kTile = kBf16Step / 2;
constexpr int kRows = 8;  // by 32 columns: 16 sums in registers

void eight_rows(const uint16_t* a, const uint16_t* b, int64_t steps, float* out, int64_t stride, bool accumulate) {
  __m512 sum[kRows][2];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < 2; ++j) sum[i][j] = accumulate ? _mm512_loadu_ps(out + i * stride + j * 16) : _mm512_setzero_ps();
  }
  for (int64_t s = 0; s < steps; ++s, a += kBf16Step, b += kBf16Step) {
    for (int64_t pair = 0; pair < 16; ++pair) {
      const __m512bh left = (__m512bh)_mm512_load_si512(b + pair * 32);
      const __m512bh right = (__m512bh)_mm512_load_si512(b + kTile + pair * 32);
      for (int i = 0; i < kRows; ++i) {
        int32_t word;
        std::memcpy(&word, a + i * 32 + pair * 2, sizeof(word));
        const __m512bh both = (__m512bh)_mm512_set1_epi32(word);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], both, left);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], both, right);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < 2; ++j) _mm512_storeu_ps(out + i * stride + j * 16, sum[i][j]);
  }
}

void block(const uint16_t* a, const uint16_t* b, int64_t steps, float* out, int64_t stride, bool accumulate) {
  for (int64_t i = 0; i < kBf16Block; i += kRows) {
    eight_rows(a + i / 16 * kTile + i % 16 * kBf16Depth, b, steps, out + i * stride, stride, accumulate);
  }
}

}  // namespace

void multiply(const Bf16Panel& panel) { for_blocks(panel, block); }

}  // namespace rlad::avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
