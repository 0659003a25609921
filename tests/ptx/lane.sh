#!/bin/sh
# What nvcc and Triton made of the kernels, translated from PTX and run on the host: the operators'
# tests on the compiled code, by the launch tables of an H200 or of MDK_SHIM_DEVICE (capability,
# multiprocessors, shared bytes per block), whose PTX the build must hold.
#   sh tests/ptx/lane.sh [python] [all]
# Without `all`, a selection for every commit: for Triton bf16, which its interpreter gets wrong.
set -eu
python=${1:-python3}
which=${2:-few}
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 MDK_SHIM_DEVICE="${MDK_SHIM_DEVICE:-90,132,232448}"

losses="tests/test_sparse_kl.py tests/test_sparse_kl_inplace.py tests/test_token_logprobs.py"
composed="tests/test_linear_sparse_kl.py tests/test_linear_token_logprobs.py tests/test_linear_autograd.py"
mixtures="tests/test_logit_mix.py tests/test_mix_argmax.py tests/test_mix_sample.py
  tests/test_mix_filters.py tests/test_mix_verify.py"
cuda="tests/test_cuda_host.py tests/test_mix_cuda_host.py tests/test_knn_targets_gpu.py"
few_cuda="cuda_host or knn or 50257 or gpt2 or (widths and bfloat16)"
few_triton="triton and ((bfloat16 and (normal or widths and 4097)) or matches_the_loop or 5003-dtype1)"
if [ "$which" = all ]; then few_cuda=cuda few_triton=triton; fi

status=0
if ls build/cmake-*/CMakeFiles/cuda_kernels.dir >/dev/null 2>&1; then
  MDK_CUDA_SHIM=$("$python" tests/ptx/objects.py)
  export MDK_CUDA_SHIM
  # shellcheck disable=SC2086  # one word per file
  "$python" -m pytest -p no:cacheprovider -n 2 $cuda $losses -k "$few_cuda" || status=$?
  [ "$which" != all ] ||
    "$python" -m pytest -p no:cacheprovider -n 2 $mixtures $composed -k "$few_cuda" || status=$?
  unset MDK_CUDA_SHIM
else
  echo "the CUDA extension was not built (no nvcc?): only the kernels of Triton"
fi
# shellcheck disable=SC2086
MDK_PTX_TRITON=1 "$python" -m pytest -p no:cacheprovider -n 2 tests/test_knn_targets_gpu.py \
  $losses $mixtures -k "$few_triton" || status=$?
exit "$status"
