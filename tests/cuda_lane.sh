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

# The two halves run side by side; what one prints is held back until the other has ended.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086  # one word per file
sh "$here/cuda_host.sh" "$python" thread $hosts \
  -k "test_loss or test_logprobs or last_threads or test_mix_and_argmax or test_draws \
or matches_the_loop or 1024" >"$log" 2>&1 &
races=$!
status=0
# shellcheck disable=SC2086
sh "$here/cuda_host.sh" "$python" address $hosts \
  tests/test_sparse_kl.py tests/test_sparse_kl_inplace.py tests/test_token_logprobs.py \
  -k "cuda_host or knn or ($few)" || status=$?
wait "$races" || status=$?
cat "$log"
exit "$status"
