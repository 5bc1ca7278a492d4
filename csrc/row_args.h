// What the ops hand to a row pass: plain pointers and numbers, the same for every instruction set.
#pragma once

#include <cstdint>

namespace rlad {

constexpr int64_t kMaxTopK = 1024;
constexpr int64_t kColumnStretch = 4096;  // columns column_stats handles at a time: their sums stay in the first-level cache

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

template <class T>
struct FoldArgs {
  Tile<T> tile;
  Mat<T> stats;  // (6, R): m, rest, restz, restsq, sumz, first
  Mat<T> slot_logits;
  bool exclude, entropy, extras;
};

template <class T>
struct TopkArgs {
  Tile<T> tile;
  Mat<T> stats;
  Mat<T> slot_logits;
  Mat<T> top_logits;      // (R, K), each row a heap between calls
  Mat<int32_t> top_ids;
  int64_t k;
  bool entropy;
};

template <class T>
struct DlogitsArgs {
  Tile<T> tile;
  AnyMat out;  // (R, C), may be the logits
  Mat<const T> slot_dz;  // (R, J): the whole dL/dz of each slot
  Mat<const T> rows;     // (6, R): lse, w, b, H, t, tail_lse
  bool entropy, tail;
};

template <class T>
struct ColumnArgs {
  Tile<T> tile;  // without slots
  const T* lse;  // (R,)
  int64_t rows, block;
  Mat<T> top, sum, sloped;  // (blocks, C); sloped only with a softcap
};

template <class T>
struct GatherArgs {
  AnyMat hidden;  // (N, D): read by dot and dweight, written by dhidden
  AnyMat weight;  // (V, D): read by dot and dhidden, written by dweight
  int64_t dim, vocab, k;
  Mat<T> grad;             // (N, K): written by dot, read by the others
  Mat<const int32_t> ids;  // (N, K) for dot and dhidden
  const int64_t* order;       // (N·K,) for dweight
  const int32_t* sorted_ids;  // (N·K,) for dweight
  int64_t positions;
  bool add;  // dweight adds to what is there
};

enum class Family { sym, mix, todi, alpha_beta, taid, log_square, total_variation };

template <class T>
struct DivergenceArgs {
  Tile<T> student, teacher;           // whole rows, without slots
  Mat<const T> norm, teacher_norm;    // (2, R): max z, lse − max
  Mat<const T> rows;                  // (4, R): weight of the value, of the gradient; of forward and reverse KL for Family::sym
  T* value;                           // (R,)
  Mat<T> out;                         // (R, C), may be the student's logits; data null without a gradient
  Family family;
  double numbers[3];  // what the family wants
  bool accumulate;    // add to value and out
};

// Every function does the rows of [begin, end); column_stats: the stretches of columns; dweight: the runs that start there.
template <class T>
struct RowPasses {
  void (*fold)(const FoldArgs<T>&, int64_t begin, int64_t end);
  void (*fold_topk)(const TopkArgs<T>&, int64_t begin, int64_t end);
  void (*dlogits)(const DlogitsArgs<T>&, int64_t begin, int64_t end);
  void (*column_stats)(const ColumnArgs<T>&, int64_t begin, int64_t end);
  void (*gather_dot)(const GatherArgs<T>&, int64_t begin, int64_t end);
  void (*gather_dhidden)(const GatherArgs<T>&, int64_t begin, int64_t end);
  void (*gather_dweight)(const GatherArgs<T>&, int64_t begin, int64_t end);
  void (*divergence)(const DivergenceArgs<T>&, int64_t begin, int64_t end);
};

struct Variant {
  RowPasses<float> f32;
  RowPasses<double> f64;
};

}  // namespace rlad
