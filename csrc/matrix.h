// Matrices, and a tile of logits, as a pass sees them: plain pointers and numbers, the same for every instruction set.
#pragma once

#include <cstdint>

namespace rlad {

constexpr int64_t kMaxTopK = 1024;

enum class Elem { f32, f64, bf16, f16 };
inline int64_t size_of(Elem e) { return e == Elem::f64 ? 8 : e == Elem::f32 ? 4 : 2; }

// Rows of any stride whose elements lie next to each other.
template <class T>
struct Mat {
  T* data;
  int64_t stride;
  T* row(int64_t i) const { return data + i * stride; }
};

// As Mat, where the element type is known at run time only.
struct AnyMat {
  char* data;
  int64_t stride;  // in elements
  Elem elem;
  char* at(int64_t i, int64_t j) const { return data + (i * stride + j) * size_of(elem); }
};

// Raw logits of one tile, and what turns them into tempered logits z.
template <class T>
struct Tile {
  Mat<const T> logits;  // (R, C)
  int64_t cols, col0;
  const T* bias;      // (C,) or null
  const T* inv_temp;  // (R,)
  double logit_scale, softcap;
  Mat<const int32_t> slots;  // (R, J) global columns
  int64_t num_slots;
};

}  // namespace rlad
