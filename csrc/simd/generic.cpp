// Row passes for any CPU: 16-byte vectors, which every 64-bit architecture has.
#include "system.h"

#define RLAD_ISA generic
#define RLAD_VECTOR_BYTES 16
#include "variant.h"
