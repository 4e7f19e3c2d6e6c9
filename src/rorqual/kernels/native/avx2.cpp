#include "tile_avx2.h"

#include "quantised.h"

#include "attention.h"
#include "dense.h"

extern const Kernels kernels_avx2 = {"avx2", linear, experts, dense, mla, gqa};
