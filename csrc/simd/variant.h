// All row passes of one instruction set, gathered in its table. Included by each instruction-set file after system.h, once
// RLAD_ISA and RLAD_VECTOR_BYTES are set and the compiler's target is raised.
#pragma once

#include "vec.h"
#include "exp.h"
#include "cast.h"
#include "tile.h"
#include "fold.h"
#include "topk.h"
#include "dlogits.h"
#include "columns.h"
#include "gather.h"
#include "special.h"
#include "divergence_terms.h"
#include "divergence.h"

namespace rlad::RLAD_ISA {

template <class T>
constexpr RowPasses<T> kPasses = {fold<T>,       fold_topk<T>,      dlogits<T>,        column_stats<T>,
                                  gather_dot<T>, gather_dhidden<T>, gather_dweight<T>, divergence<T>};

extern const Variant variant;
const Variant variant = {kPasses<float>, kPasses<double>};

}  // namespace rlad::RLAD_ISA
