#define MDK_ISA_NEON
#define MDK_ISA_NAME "neon"
#define MDK_TABLE mdk_kernels_neon
#include "kernels.inl"
