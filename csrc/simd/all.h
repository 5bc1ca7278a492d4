// What a row pass is written with. No header here has #pragma once: each_isa.h includes them once per instruction set.
#include "vec.h"
#include "exp.h"
#include "cast.h"
#include "tile.h"
#include "special.h"
