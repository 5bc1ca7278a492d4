// huge_pages_: asks the system to back a large, still untouched tensor with 2 MiB pages. Its first write then costs a few
// hundred page faults instead of tens of thousands, which for d_weight and for a chunk of logits is a tenth of a product.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rlad {

namespace {

void huge_pages_(const torch::stable::Tensor& x) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(x.numel()) * x.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: refusing it is no error
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlad, CPU, m) { m.impl("huge_pages_", TORCH_BOX(&huge_pages_)); }

}  // namespace rlad
