#!/bin/sh
# The CUDA kernels on the host, twice: the operators' own tests under AddressSanitizer and
# UndefinedBehaviorSanitizer, and every shape of launch under ThreadSanitizer as race checker.
#   sh tests/cuda_lane.sh [python]
set -eu
python=${1:-python3}
here=$(dirname "$0")

# One dtype and few widths of the operators' tests: the others run the same code, and a CUDA thread
# costs microseconds here.
few="not gpt2 and not 50257 and not nan_logits and not float32 and not cuda-float16"
few="$few and not 4095 and not 4096 and not 8191 and not 12289 and not sum_to_one"
hosts="tests/test_cuda_host.py tests/test_mix_cuda_host.py tests/test_knn_targets_gpu.py"

# Side by side; what the others print is held back until the last has ended.
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
# shellcheck disable=SC2086  # one word per file
sh "$here/cuda_host.sh" "$python" thread $hosts \
  -k "test_loss or test_logprobs or last_threads or test_mix_and_argmax or matches_the_loop or 1024 \
or (test_draws and 301) or test_verification" >"$logs/thread" 2>&1 &
races=$!
sh "$here/cuda_host.sh" "$python" address tests/test_mix_cuda_host.py \
  tests/test_plain_mixture.py -k "mix_cuda_host or (no_bit_depends and cuda and 0.3)" >"$logs/mix" 2>&1 &
mixtures=$!
status=0
sh "$here/cuda_host.sh" "$python" address tests/test_cuda_host.py tests/test_knn_targets_gpu.py \
  tests/test_sparse_kl.py tests/test_sparse_kl_inplace.py tests/test_token_logprobs.py \
  -k "cuda_host or knn or ($few)" || status=$?
wait "$races" || status=$?
wait "$mixtures" || status=$?
cat "$logs/thread" "$logs/mix"
exit "$status"
