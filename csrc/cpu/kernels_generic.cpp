#define MDK_ISA_NAME "generic"
#define MDK_TABLE mdk_kernels_generic
#include "kernels.inl"
