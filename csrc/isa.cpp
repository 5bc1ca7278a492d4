#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace rlad {

namespace generic { extern const Variant variant; }
#if defined(__x86_64__)
namespace avx2 { extern const Variant variant; }
namespace avx512 { extern const Variant variant; }
#endif

namespace {

struct Candidate {
  Isa isa;
  bool supported;
};

// Best last. avx512_bf16 shares the avx512 row passes: they hold float32 only.
const Candidate* candidates(int& count) {
  static const Candidate list[] = {
      {{"generic", &generic::variant}, true},
#if defined(__x86_64__)
      {{"avx2", &avx2::variant}, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {{"avx512", &avx512::variant}, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {{"avx512_bf16", &avx512::variant}, __builtin_cpu_supports("avx512bf16") != 0},
#else
      {{"avx2", nullptr}, false},
      {{"avx512", nullptr}, false},
      {{"avx512_bf16", nullptr}, false},
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
