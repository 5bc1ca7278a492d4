// The op on two tiles of whole rows: divergence_.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "isa.h"
#include "tiles.h"

namespace rlad {

namespace {

Family family_of(const Checker& check, const std::string& name) {
  if (name == "sym") return Family::sym;
  if (name == "mix") return Family::mix;
  if (name == "todi") return Family::todi;
  if (name == "alpha_beta") return Family::alpha_beta;
  if (name == "taid") return Family::taid;
  if (name == "log_square") return Family::log_square;
  if (name == "total_variation") return Family::total_variation;
  check.fail("family", "sym, mix, todi, alpha_beta, taid, log_square or total_variation", name);
}

template <class T>
void run(const Checker& check, const Tensor& value, const std::optional<Tensor>& out, const Tensor& logits,
         const std::optional<Tensor>& bias, const Tensor& inv_temp, double logit_scale, double softcap, const Tensor& norm,
         const Tensor& teacher, const std::optional<Tensor>& teacher_bias, const Tensor& teacher_inv_temp, double teacher_scale,
         double teacher_softcap, const Tensor& teacher_norm, const Tensor& rows, const std::string& family, double a, double b,
         double c, bool accumulate) {
  const int64_t n = logits.size(0), cols = logits.size(1);
  check.tensor("value", value, kAcc<T>, {n});
  DivergenceArgs<T> args{whole_rows<T>(check, "logits", logits, n, cols, bias, inv_temp, logit_scale, softcap),
                         whole_rows<T>(check, "teacher", teacher, n, cols, teacher_bias, teacher_inv_temp, teacher_scale, teacher_softcap),
                         check.mat<const T>("norm", norm, kAcc<T>, 2, n),
                         check.mat<const T>("teacher_norm", teacher_norm, kAcc<T>, 2, n),
                         check.mat<const T>("rows", rows, kAcc<T>, 4, n),
                         static_cast<T*>(value.mutable_data_ptr()),
                         {nullptr, 0},
                         family_of(check, family),
                         {a, b, c},
                         accumulate};
  if (out) args.out = check.mat<T>("out", *out, kAcc<T>, n, cols);
  const auto pass = row_passes<T>().divergence;
  torch::stable::parallel_for(0, n, rows_per_thread(cols), [&](int64_t begin, int64_t end) { pass(args, begin, end); });
}

void divergence_(const Tensor& value, const std::optional<Tensor>& out, const Tensor& logits, const std::optional<Tensor>& bias,
                 const Tensor& inv_temp, double logit_scale, double softcap, const Tensor& norm, const Tensor& teacher,
                 const std::optional<Tensor>& teacher_bias, const Tensor& teacher_inv_temp, double teacher_scale,
                 double teacher_softcap, const Tensor& teacher_norm, const Tensor& rows, const std::string& family, double a,
                 double b, double c, bool accumulate) {
  const Checker check("divergence_");
  check.shape("logits", logits, {kAny, kAny});
  by_dtype(check, logits, [&](auto acc) {
    run<decltype(acc)>(check, value, out, logits, bias, inv_temp, logit_scale, softcap, norm, teacher, teacher_bias, teacher_inv_temp,
                       teacher_scale, teacher_softcap, teacher_norm, rows, family, a, b, c, accumulate);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlad, CPU, m) { m.impl("divergence_", TORCH_BOX(&divergence_)); }

}  // namespace rlad
