#include "kernels.h"
extern const Kernels kernels_portable = {"portable"};
