// bfloat16 and float16 in and out: widened exactly, rounded to nearest even.

namespace rlad::RLAD_ISA {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

RLAD_INLINE Simd<float>::U load_half_bits(const void* p, int64_t count) {
  Simd<float>::Half h{};
  std::memcpy(&h, p, count * sizeof(uint16_t));
  return __builtin_convertvector(h, Simd<float>::U);
}

template <class T>
RLAD_INLINE Vec<T> widen(const T* p, int64_t count) {
  return count == kLanes<T> ? load(p) : load_first(p, count);
}

RLAD_INLINE Vec<float> widen(const bf16* p, int64_t count) { return (Vec<float>)(load_half_bits(p, count) << 16); }

// float16's exponent and mantissa moved into float32's places are the value times 2⁻¹¹², subnormals included.
RLAD_INLINE Vec<float> widen(const f16* p, int64_t count) {
  using U = Simd<float>::U;
  const U h = load_half_bits(p, count);
  const U magnitude = (h & 0x7fffu) << 13;
  const U finite = (U)((Vec<float>)magnitude * 0x1p112f);
  const U inf_or_nan = magnitude | 0x7f800000u;
  return (Vec<float>)(((h & 0x8000u) << 16) | (magnitude >= 0x0f800000u ? inf_or_nan : finite));
}

template <class T>
T widen_one(Elem elem, const void* p) {
  switch (elem) {
    case Elem::f32: return T(*static_cast<const float*>(p));
    case Elem::f64: return T(*static_cast<const double*>(p));
    case Elem::bf16: return T(widen(static_cast<const bf16*>(p), 1)[0]);
    case Elem::f16: return T(widen(static_cast<const f16*>(p), 1)[0]);
  }
  return T(0);
}

// The scalar forms below are branch-free on purpose: the loops of narrow() vectorise.
RLAD_INLINE uint16_t round_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

RLAD_INLINE uint16_t round_f16(float x) {
  uint32_t u, tiny;
  std::memcpy(&u, &x, 4);
  const uint32_t magnitude = u & 0x7fffffffu;
  float shifted;
  std::memcpy(&shifted, &magnitude, 4);
  shifted += 0.5f;  // one ulp of 0.5 is float16's smallest subnormal: this addition rounds to it
  std::memcpy(&tiny, &shifted, 4);
  tiny -= 0x3f000000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const uint32_t finite = magnitude < (113u << 23) ? tiny : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return uint16_t(((u >> 16) & 0x8000u) | (magnitude >= 0x477ff000u ? large : finite));  // from 65520 on: inf
}

// out[0 … count) = src, in out's element type.
template <class T>
void narrow(Elem elem, void* out, const T* __restrict src, int64_t count) {
  switch (elem) {
    case Elem::f32:
      for (int64_t j = 0; j < count; ++j) static_cast<float*>(out)[j] = float(src[j]);
      break;
    case Elem::f64:
      for (int64_t j = 0; j < count; ++j) static_cast<double*>(out)[j] = double(src[j]);
      break;
    case Elem::bf16:
      for (int64_t j = 0; j < count; ++j) static_cast<uint16_t*>(out)[j] = round_bf16(float(src[j]));
      break;
    case Elem::f16:
      for (int64_t j = 0; j < count; ++j) static_cast<uint16_t*>(out)[j] = round_f16(float(src[j]));
      break;
  }
}

}  // namespace rlad::RLAD_ISA
