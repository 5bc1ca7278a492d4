// Argument checks of the ops: only what would read or write outside a tensor. Failing ones throw std::runtime_error, which
// Python sees as RuntimeError; STD_TORCH_CHECK would put this file's path in front of the message.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>
#include <type_traits>

#include "matrix.h"

namespace rlad {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAny = -1;  // in a wanted shape: any size

template <class T>
constexpr ScalarType kAcc = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

// One op's name and the checks of its arguments.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  // Throws "<op>: <arg> must be <wanted>, got <got>".
  [[noreturn]] void fail(const char* arg, const std::string& wanted, const std::string& got) const;
  [[noreturn]] void fail(const char* arg, const std::string& wanted, const Tensor& got) const;

  // dtype, shape (kAny matches any size) and elements of a row next to each other.
  void tensor(const char* arg, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape) const;
  void shape(const char* arg, const Tensor& t, std::initializer_list<int64_t> shape) const;
  Elem elem(const char* arg, const Tensor& t) const;

  template <class T>
  Mat<T> mat(const char* arg, const Tensor& t, ScalarType dtype, int64_t rows, int64_t cols) const {
    tensor(arg, t, dtype, {rows, cols});
    if constexpr (std::is_const_v<T>) return {static_cast<T*>(t.const_data_ptr()), t.stride(0)};
    else return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0)};
  }

  template <class T>
  const T* vec(const char* arg, const Tensor& t, ScalarType dtype, int64_t size) const {
    tensor(arg, t, dtype, {size});
    return static_cast<const T*>(t.const_data_ptr());
  }

  AnyMat any_mat(const char* arg, const Tensor& t, int64_t rows, int64_t cols, bool written) const;

 private:
  const char* op_;
};

}  // namespace rlad
