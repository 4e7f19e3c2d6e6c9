#include "tile_portable.h"

#include "quantised.h"

#include "attention.h"
#include "causal.h"
#include "elementwise.h"
#include "decoder.h"
#include "gated.h"
#include "softmax.h"

extern const Kernels kernels_portable = {
    "portable", linear, experts, rows, mla, gqa, rms_norm, rope, survey, gated, gated_back, softmax, causal,
    causal_back, layers};
