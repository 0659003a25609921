#!/bin/sh
# The CUDA kernels on the host, twice: the operators' own tests under AddressSanitizer and
# UndefinedBehaviorSanitizer, and every shape of launch under ThreadSanitizer as race checker.
#   sh tests/cuda_lane.sh [python]
set -eu
python=${1:-python3}
here=$(dirname "$0")

# One dtype and few widths of the operators' tests: the others run the same code, and a CUDA thread
# costs microseconds here.
sh "$here/cuda_host.sh" "$python" address \
  tests/test_cuda_host.py tests/test_sparse_kl.py tests/test_sparse_kl_inplace.py \
  tests/test_token_logprobs.py tests/test_knn_targets_gpu.py \
  -k "cuda_host or (not gpt2 and not 50257 and not nan_logits and not float32 and not cuda-float16
      and not 4095 and not 4096 and not 8191 and not 12289
      and not sum_to_one)"
sh "$here/cuda_host.sh" "$python" thread tests/test_cuda_host.py tests/test_knn_targets_gpu.py \
  -k "test_loss or test_logprobs or last_threads or matches_the_loop or 1024"
