#define MDK_ISA_AVX512
#define MDK_ISA_AVX512_BF16
#define MDK_ISA_NAME "avx512_bf16"
#define MDK_TABLE mdk_kernels_avx512_bf16
#include "kernels.inl"
