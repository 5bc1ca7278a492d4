// Which instruction-set variant of the row passes and of the bfloat16 product runs.
#pragma once

#include <string>

#include "bf16_product.h"
#include "row_args.h"

namespace rlad {

struct Isa {
  const char* name;
  const Variant* passes;
  const Bf16Product* bf16;  // null: no product of bfloat16 operands
};

// The variant $RLAD_CPU_ISA names, or the best one this CPU has. Read at every call, so that a process can compare them.
const Isa& current_isa();

template <class T>
const RowPasses<T>& row_passes();
template <>
inline const RowPasses<float>& row_passes<float>() { return current_isa().passes->f32; }
template <>
inline const RowPasses<double>& row_passes<double>() { return current_isa().passes->f64; }

}  // namespace rlad
