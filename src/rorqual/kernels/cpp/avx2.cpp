#include "kernels.h"
extern const Kernels kernels_avx2 = {"avx2"};
