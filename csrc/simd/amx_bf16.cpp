// The bfloat16 product on AMX tiles. Empty elsewhere than on x86-64 Linux.
//
// tdpbf16ps, and vdpbf16ps in the sibling file, read and write subnormals as zeros and round each step's products to nearest
// even in float32, whatever the floating-point mode.
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "../bf16_product.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16")
#endif
#define RLAD_ISA amx_bf16
#include "bf16_panel.h"

namespace rlad::amx_bf16 {

namespace {

// Eight tiles of 16 rows of 64 bytes: 0 to 3 sums, 4 and 5 of a, 6 and 7 of b.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kConfig{};

constexpr int64_t kTile = kBf16Step / 2, kAhead = 2 * kBf16Step;

inline __attribute__((always_inline)) void fetch(const uint16_t* tile) {
  for (int64_t i = 0; i < kTile; i += 32) __builtin_prefetch(tile + i, 0, 3);
}

void block(const uint16_t* a, const uint16_t* b, int64_t steps, float* out, int64_t stride, bool accumulate) {
  const int64_t bytes = stride * int64_t(sizeof(float));
  float* low = out + 16 * stride;
  if (accumulate) {
    _tile_loadd(0, out, bytes);
    _tile_loadd(1, out + 16, bytes);
    _tile_loadd(2, low, bytes);
    _tile_loadd(3, low + 16, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += kBf16Step, b += kBf16Step) {
    // Each load has a product between it and the next, so that they overlap; panels are in L2, which a tile load waits for.
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    fetch(a + kAhead);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTile, 64);
    fetch(b + kAhead);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTile, 64);
    fetch(a + kAhead + kTile);
    _tile_dpbf16ps(2, 5, 6);
    fetch(b + kAhead + kTile);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + 16, bytes);
  _tile_stored(2, low, bytes);
  _tile_stored(3, low + 16, bytes);
}

}  // namespace

// The thread's own tile configuration comes back afterwards: other libraries keep theirs from call to call.
void multiply(const Bf16Panel& panel) {
  alignas(64) char before[sizeof(TileConfig)];
  _tile_storeconfig(before);
  _tile_loadconfig(&kConfig);
  for_blocks(panel, block);
  _tile_loadconfig(before);
}

// Linux hands out the tile registers on request, once per process.
bool permitted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace rlad::amx_bf16
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
