#include "tile_avx2.h"

#include "quantised.h"

#include "attention.h"
#include "dense.h"
#include "elementwise.h"

extern const Kernels kernels_avx2 = {"avx2", linear, experts, dense, mla, gqa, rms_norm, rope};
