#include "kernels.h"
extern const Kernels kernels_avx512 = {"avx512"};
