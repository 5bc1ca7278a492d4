// huge_pages_: asks the system to back a large, still untouched tensor with 2 MiB pages. Its first write then costs a few
// hundred page faults instead of tens of thousands, which for d_weight and for a chunk of logits is a tenth of a product. Not in
// a virtual machine whose kernel hands free huge pages back to its host: there each is had anew, at a quarter of small pages' speed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>

#include <fstream>
#endif

namespace rlad {

namespace {

#ifdef __linux__
constexpr uintptr_t kPage = 2 << 20;

// Free page reporting: the host is offered free blocks of 2^order small pages, or more; −1 where it wants none.
bool reported_when_free() {
  std::ifstream file("/sys/module/page_reporting/parameters/page_reporting_order");
  int64_t order;
  return file >> order && 0 <= order && order <= 9;
}
#endif

void huge_pages_(const torch::stable::Tensor& x) {
#ifdef __linux__
  static const bool reported = reported_when_free();
  if (reported) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(x.numel()) * x.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: refusing it is no error
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlad, CPU, m) { m.impl("huge_pages_", TORCH_BOX(&huge_pages_)); }

}  // namespace rlad
