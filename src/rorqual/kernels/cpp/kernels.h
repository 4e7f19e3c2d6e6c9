// The kernels that every variant provides, as a table; dispatch.cpp picks one table at run time.
#pragma once

struct Kernels {
    const char* isa;
};

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
