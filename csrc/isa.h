// Which instruction set the row passes and the bfloat16 product run on.
#pragma once

#include "bf16_product.h"

namespace rlad {

enum class Level { generic, avx2, avx512 };  // what each_isa.h compiles the row passes for, in its order

struct Isa {
  const char* name;
  Level level;              // of the row passes
  const Bf16Product* bf16;  // null: no product of bfloat16 operands
};

// What $RLAD_CPU_ISA names, or the best this CPU has. Read at every call, so that a process can compare them.
const Isa& current_isa();

}  // namespace rlad
