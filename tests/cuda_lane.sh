#!/bin/sh
# The CUDA kernels on the host, twice: the operators' own tests under AddressSanitizer and
# UndefinedBehaviorSanitizer, and every shape of launch under ThreadSanitizer as race checker.
#   sh tests/cuda_lane.sh [python]
set -eu
python=${1:-python3}
here=$(dirname "$0")

# Few widths: each exercises the same code as its neighbours, and a CUDA thread costs more here.
sh "$here/cuda_host.sh" "$python" address \
  tests/test_cuda_host.py tests/test_sparse_kl.py tests/test_sparse_kl_inplace.py \
  tests/test_token_logprobs.py \
  -k "not gpt2 and not 50257 and not nan_logits and not 4095 and not 4096 and not 8191 and not 12289
      and not (test_loss and 4097) and not (test_logprobs and 96) and not float16-one
      and not (widths and (bfloat16 or float16))"
sh "$here/cuda_host.sh" "$python" thread tests/test_cuda_host.py \
  -k "(test_loss and 301 and float32 and not clusters) or (test_logprobs and forwards and float32)
      or last_threads"
