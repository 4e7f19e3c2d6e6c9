#include "tile_avx512.h"

#include "quantised.h"

#include "attention.h"
#include "dense.h"
#include "elementwise.h"

extern const Kernels kernels_avx512 = {"avx512", linear, experts, dense, mla, gqa, rms_norm, rope};
