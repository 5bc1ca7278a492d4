#include "checks.h"

#include <stdexcept>

namespace rlad {

namespace {

std::string name_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(t);
  }
}

template <class List>
std::string tuple_of(const List& values) {
  std::string out;
  for (int64_t v : values) out += (out.empty() ? "(" : ", ") + (v == kAny ? std::string("*") : std::to_string(v));
  return out.empty() ? "()" : out + ")";
}

std::string describe(const Tensor& t) {
  return name_of(t.scalar_type()) + " " + tuple_of(t.sizes()) + " with strides " + tuple_of(t.strides());
}

bool fits(const Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.dim() != int64_t(shape.size())) return false;
  int64_t d = 0;
  for (int64_t want : shape) {
    if (want != kAny && t.size(d) != want) return false;
    ++d;
  }
  return d == 0 || t.size(d - 1) <= 1 || t.numel() == 0 || t.stride(d - 1) == 1;
}

}  // namespace

void Checker::fail(const char* arg, const std::string& wanted, const std::string& got) const {
  throw std::runtime_error(std::string(op_) + ": " + arg + " must be " + wanted + ", got " + got);
}

void Checker::fail(const char* arg, const std::string& wanted, const Tensor& got) const { fail(arg, wanted, describe(got)); }

void Checker::shape(const char* arg, const Tensor& t, std::initializer_list<int64_t> shape) const {
  if (!fits(t, shape)) fail(arg, tuple_of(shape) + " with stride 1 in its last dimension", t);
}

void Checker::tensor(const char* arg, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape) const {
  if (t.scalar_type() != dtype || !fits(t, shape)) {
    fail(arg, name_of(dtype) + " " + tuple_of(shape) + " with stride 1 in its last dimension", t);
  }
}

Elem Checker::elem(const char* arg, const Tensor& t) const {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Elem::f32;
    case ScalarType::Double: return Elem::f64;
    case ScalarType::BFloat16: return Elem::bf16;
    case ScalarType::Half: return Elem::f16;
    default: fail(arg, "float32, float64, bfloat16 or float16", t);
  }
}

AnyMat Checker::any_mat(const char* arg, const Tensor& t, int64_t rows, int64_t cols, bool written) const {
  shape(arg, t, {rows, cols});
  void* data = written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
  return {static_cast<char*>(data), t.stride(0), elem(arg, t)};
}

}  // namespace rlad
