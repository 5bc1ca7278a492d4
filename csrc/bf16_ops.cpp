// bf16_mm_: the product of bfloat16 matrices in float32, and whether this CPU has it.
//
// The shorter side of out is packed once for all threads, the longer one is cut into panels that a thread packs for itself.
// Each value of out is one sum in the order of the summed dimension: the same bits for any number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "checks.h"
#include "isa.h"

namespace rlad {

namespace {

constexpr int64_t kDepth = 1024;  // of the summed dimension at a time: a block of either operand takes 64 KiB
constexpr int64_t kPanel = 256;   // of the longer side at a time: half of a core's L2
static_assert(kDepth % kBf16Depth == 0 && kPanel % kBf16Block == 0);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint16_t, Free>;

Buffer packed_buffer(int64_t vectors, int64_t steps) {
  void* p = std::aligned_alloc(64, ceil_div(vectors, kBf16Block) * kBf16Step * steps * sizeof(uint16_t));
  if (!p) throw std::bad_alloc();
  return Buffer(static_cast<uint16_t*>(p));
}

// As vectors along dimension `summed` of t.
Bf16Operand operand(const Checker& check, const char* arg, const Tensor& t, int summed) {
  if (t.scalar_type() != ScalarType::BFloat16 || t.dim() != 2) check.fail(arg, "a bfloat16 matrix", t);
  const int64_t size = t.size(1 - summed), depth = t.size(summed);
  const int64_t across = t.stride(1 - summed), along = t.stride(summed);
  const bool deep = along == 1 || depth <= 1;
  if (!deep && across != 1 && size > 1) check.fail(arg, "a matrix with stride 1 in one dimension", t);
  return {static_cast<const uint16_t*>(t.const_data_ptr()), size, depth, deep ? across : along, deep};
}

struct Product {
  const Bf16Product& kernel;
  Bf16Operand a, b;
  Mat<float> out;

  void run(bool accumulate) const {
    const bool tall = a.size >= b.size;
    const Bf16Operand &longer = tall ? a : b, &shorter = tall ? b : a;
    const int64_t all_steps = ceil_div(a.depth, kBf16Depth), most_steps = std::min(kDepth / kBf16Depth, all_steps);
    const int64_t blocks = ceil_div(shorter.size, kBf16Block);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t share = ceil_div(longer.size, kBf16Block * threads) * kBf16Block;
    const int64_t panel = std::min(kPanel, share), panels = ceil_div(longer.size, panel);
    const Buffer shared = packed_buffer(shorter.size, most_steps);
    for (int64_t s0 = 0; s0 < all_steps; s0 += most_steps) {
      const int64_t steps = std::min(most_steps, all_steps - s0);
      const auto block = [&](int64_t i) { return shared.get() + i * kBf16Step * steps; };
      torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
        kernel.pack(shorter, tall, begin * kBf16Block, end * kBf16Block, s0 * kBf16Depth, steps, block(begin));
      });
      std::atomic<int64_t> taken{0};  // threads are not always equally fast
      torch::stable::parallel_for(0, std::min(panels, threads), 1, [&](int64_t, int64_t) {
        const Buffer own = packed_buffer(panel, steps);
        for (int64_t p; (p = taken++) < panels;) {
          const int64_t v0 = p * panel, size = std::min(panel, longer.size - v0);
          kernel.pack(longer, !tall, v0, v0 + size, s0 * kBf16Depth, steps, own.get());
          for (int64_t i = 0; i < blocks; ++i) {
            const int64_t u = i * kBf16Block, rest = std::min(kBf16Block, shorter.size - u);
            const bool add = accumulate || s0 > 0;
            kernel.multiply(tall ? Bf16Panel{own.get(), block(i), size, rest, steps, out.row(v0) + u, out.stride, add}
                                 : Bf16Panel{block(i), own.get(), rest, size, steps, out.row(u) + v0, out.stride, add});
          }
        }
      });
    }
  }
};

void bf16_mm_(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  const Checker check("bf16_mm_");
  const Isa& isa = current_isa();
  if (!isa.bf16) check.fail("RLAD_CPU_ISA", "avx512_bf16 or amx_bf16, on a CPU that has it", isa.name);
  const Bf16Operand left = operand(check, "a", a, 1), right = operand(check, "b", b, 0);
  if (left.depth != right.depth) check.fail("b", "a matrix with a's " + std::to_string(left.depth) + " columns as its rows", b);
  const Product product{*isa.bf16, left, right, check.mat<float>("out", out, ScalarType::Float, left.size, right.size)};
  if (left.size == 0 || right.size == 0) return;
  if (left.depth > 0) return product.run(accumulate);
  for (int64_t i = 0; i < left.size && !accumulate; ++i) std::fill_n(product.out.row(i), right.size, 0.0f);
}

bool has_bf16_mm() { return current_isa().bf16 != nullptr; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlad, CPU, m) { m.impl("bf16_mm_", TORCH_BOX(&bf16_mm_)); }
STABLE_TORCH_LIBRARY_IMPL(rlad, CompositeExplicitAutograd, m) { m.impl("has_bf16_mm", TORCH_BOX(&has_bf16_mm)); }

}  // namespace rlad
