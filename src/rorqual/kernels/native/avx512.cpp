#include "tile_avx512.h"

#include "quantised.h"

#include "attention.h"
#include "causal.h"
#include "elementwise.h"
#include "decoder.h"
#include "gated.h"
#include "softmax.h"

extern const Kernels kernels_avx512 = {
    "avx512", linear, experts, rows, mla, gqa, rms_norm, rope, survey, gated, gated_back, softmax, causal,
    causal_back, layers};
