#define MDK_ISA_AVX2
#define MDK_ISA_NAME "avx2"
#define MDK_TABLE mdk_kernels_avx2
#include "kernels.inl"
