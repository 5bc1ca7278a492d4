// Everything an instruction-set file needs from outside. Included before the target is raised: code of these headers must
// run on every CPU, whichever file the linker takes it from.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../row_args.h"
