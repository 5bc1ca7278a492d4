// Walks the blocks of a panel. Included by each file with a block kernel, after the compiler's target is raised.
#pragma once

namespace rlad::RLAD_ISA {

// A block over the edge of out goes through scratch. Out of line: the tile instructions' builtins do not tell the compiler
// that they read memory.
__attribute__((noinline)) static void copy_edge(const float* from, int64_t from_stride, float* to, int64_t to_stride,
                                                int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, cols * sizeof(float));
}

// block(a, b, steps, out, stride, accumulate) makes the 32×32 values of one block.
template <class Block>
void for_blocks(const Bf16Panel& p, Block block) {
  alignas(64) float scratch[kBf16Block * kBf16Block] = {};
  for (int64_t i = 0; i < p.rows; i += kBf16Block) {
    for (int64_t j = 0; j < p.cols; j += kBf16Block) {
      const uint16_t* a = p.a + i * p.steps * kBf16Depth;
      const uint16_t* b = p.b + j * p.steps * kBf16Depth;
      const int64_t rows = p.rows - i, cols = p.cols - j;
      float* out = p.out + i * p.stride + j;
      if (rows >= kBf16Block && cols >= kBf16Block) {
        block(a, b, p.steps, out, p.stride, p.accumulate);
        continue;
      }
      const int64_t r = rows < kBf16Block ? rows : kBf16Block, c = cols < kBf16Block ? cols : kBf16Block;
      if (p.accumulate) copy_edge(out, p.stride, scratch, kBf16Block, r, c);
      block(a, b, p.steps, scratch, kBf16Block, p.accumulate);
      copy_edge(scratch, kBf16Block, out, p.stride, r, c);
    }
  }
}

}  // namespace rlad::RLAD_ISA
