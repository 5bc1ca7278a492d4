// The bfloat16 matrix product of an instruction set: how operands are packed, and the kernel that multiplies packed panels.
#pragma once

#include <cstdint>

namespace rlad {

constexpr int64_t kBf16Block = 32;      // rows and columns of out the kernel makes at a time
constexpr int64_t kBf16Depth = 32;      // elements of the summed dimension in one step
constexpr int64_t kBf16Step = kBf16Block * kBf16Depth;  // elements of one packed step, 2 KiB

// A bfloat16 operand as `size` vectors along the summed dimension: the rows of a, the columns of b.
struct Bf16Operand {
  const uint16_t* data;
  int64_t size, depth, stride;
  bool deep;  // the elements of a vector lie next to each other, and vectors `stride` apart; otherwise the other way round
};

// out (+)= a @ b for packed panels of whole blocks, of which out has the first `rows` and `cols`.
struct Bf16Panel {
  const uint16_t *a, *b;
  int64_t rows, cols, steps;
  float* out;
  int64_t stride;
  bool accumulate;
};

// Packs the vectors [v0, v1) in blocks of 32, and of each block `steps` steps from k0 on, zeros beyond the operand. A step is
// two tiles of 16 vectors, in 32-bit words, each a pair of the summed dimension: word (vector, pair), or (pair, vector) for b.
using Bf16Pack = void (*)(const Bf16Operand&, bool is_b, int64_t v0, int64_t v1, int64_t k0, int64_t steps, uint16_t* to);

struct Bf16Product {
  Bf16Pack pack;
  void (*multiply)(const Bf16Panel&);
};

}  // namespace rlad
