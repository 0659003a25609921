#define MDK_ISA_AVX512
#define MDK_ISA_NAME "avx512"
#define MDK_TABLE mdk_kernels_avx512
#include "kernels.inl"
