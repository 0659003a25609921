#!/bin/sh
# Runs the operator tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer.
#   sh tests/sanitize.sh [python] [pytest arguments]
# The build has a stage and a package directory of its own: the normal build stays as it is.
set -eu

python=$(command -v "${1:-python3}")
[ $# -eq 0 ] || shift
root=$(cd "$(dirname "$0")/.." && pwd)
case $python in /*) ;; *) python=$PWD/$python ;; esac
lib=$root/build/sanitize

cd "$root"
MDK_SANITIZE=1 MDK_CUDA=OFF "$python" setup.py --quiet build --build-lib "$lib"

# The sanitizer runtime must come first in the process. libstdc++ beside it, so that its
# interceptors find the real __cxa_throw. Python itself leaks by design.
cxx=${CXX:-c++}
preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"

# From inside the directory of the package: the current directory is what Python imports first.
cd "$lib"
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  "$python" -c "import mdkernels._cpu as m; assert m.__file__.startswith('$lib'), m.__file__"
# Not the distributions of many draws: they run the code of the other tests again.
tests=$(grep -lE '^OP = |mix_fixtures|import .*knn_targets|WeightGradient' "$root"/tests/test_*.py \
  | grep -v _random.py)
# Nor the variants of the reference backend, eager torch.
# A finding ends the process, so pytest must leave its standard error alone (--capture=sys).
# shellcheck disable=SC2086  # one word per file
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  "$python" -m pytest -n 2 --capture=sys --rootdir "$root" -c "$root/pyproject.toml" \
  -p no:cacheprovider $tests -k "not reference or no_reference" "$@"
