#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rlad {

#if defined(__x86_64__)
namespace bf16 { void pack(const Bf16Operand&, bool is_b, int64_t v0, int64_t v1, int64_t k0, int64_t steps, uint16_t* to); }
namespace avx512_bf16 { void multiply(const Bf16Panel&); }
#if defined(__linux__)
namespace amx_bf16 {
void multiply(const Bf16Panel&);
bool permitted();
}
#endif
#endif

namespace {

struct Candidate {
  Isa isa;
  bool supported;
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

constexpr Bf16Product kAvx512Bf16{bf16::pack, avx512_bf16::multiply};
#if defined(__linux__)
constexpr Bf16Product kAmxBf16{bf16::pack, amx_bf16::multiply};

bool has_amx_bf16() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) && amx_bf16::permitted();
}
#else
constexpr Bf16Product kAmxBf16{};
bool has_amx_bf16() { return false; }
#endif
#endif

// Best last. The last two share the avx512 row passes, which hold float32 only.
const Candidate* candidates(int& count) {
  static const Candidate list[] = {
      {{"generic", Level::generic, nullptr}, true},
#if defined(__x86_64__)
      {{"avx2", Level::avx2, nullptr}, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {{"avx512", Level::avx512, nullptr}, has_avx512()},
      {{"avx512_bf16", Level::avx512, &kAvx512Bf16}, has_avx512() && __builtin_cpu_supports("avx512bf16")},
      {{"amx_bf16", Level::avx512, &kAmxBf16}, has_amx_bf16()},
#else
      {{"avx2", Level::generic, nullptr}, false},
      {{"avx512", Level::generic, nullptr}, false},
      {{"avx512_bf16", Level::generic, nullptr}, false},
      {{"amx_bf16", Level::generic, nullptr}, false},
#endif
  };
  count = sizeof(list) / sizeof(*list);
  return list;
}

std::string names(bool supported_only) {
  int count;
  const Candidate* list = candidates(count);
  std::string out;
  for (int i = 0; i < count; ++i) {
    if (supported_only && !list[i].supported) continue;
    out += (out.empty() ? "" : ", ") + std::string(list[i].isa.name);
  }
  return out;
}

}  // namespace

const Isa& current_isa() {
  int count;
  const Candidate* list = candidates(count);
  const char* wanted = std::getenv("RLAD_CPU_ISA");
  const bool forced = wanted && *wanted;
  for (int i = count - 1; i >= 0; --i) {
    if (list[i].supported && (!forced || std::string(wanted) == list[i].isa.name)) return list[i].isa;
  }
  throw std::runtime_error("RLAD_CPU_ISA must be one of " + names(false) + ", got '" + wanted + "'; this CPU has " + names(true));
}

}  // namespace rlad
