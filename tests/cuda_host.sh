#!/bin/sh
# Runs the operator tests on the CUDA kernels compiled for the host (tests/cuda_shim).
#   sh tests/cuda_host.sh [python] [address|thread|plain] [pytest arguments]
set -eu

python=$(command -v "${1:-python3}")
[ $# -eq 0 ] || shift
mode=${1:-address}
[ $# -eq 0 ] || shift
root=$(cd "$(dirname "$0")/.." && pwd)
case $python in /*) ;; *) python=$PWD/$python ;; esac
stage=$root/build/cuda-host-$mode

"$python" -m cmake --version >/dev/null 2>&1 && cmake="$python -m cmake" || cmake=cmake
mkdir -p "$stage"
(
  flock 9  # two runs of one mode may start together
  $cmake -S "$root" -B "$stage" -G Ninja -DMDK_CUDA_SHIM="$mode" -DPython_EXECUTABLE="$python" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >/dev/null
  $cmake --build "$stage" --target _cuda_shim -j "${MAX_JOBS:-2}" >"$stage/build.log" ||
    { cat "$stage/build.log"; exit 1; }
) 9>"$stage/lock"

cxx=${CXX:-c++}
case $mode in
  # The runtime must come first in the process. libstdc++ beside it, so that its interceptors find
  # the real __cxa_throw. Python itself leaks by design.
  address) preload="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)" ;;
  thread) preload="$("$cxx" -print-file-name=libtsan.so) $("$cxx" -print-file-name=libstdc++.so)" ;;
  *) preload= ;;
esac
[ "$mode" != thread ] || rm -f "$stage"/race.*
cd "$root"
MDK_CUDA_SHIM=$(ls "$stage"/lib/_cuda.*so)
export MDK_CUDA_SHIM
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  TSAN_OPTIONS=halt_on_error=1:exitcode=66:log_path="$stage/race" OMP_NUM_THREADS=1 \
  "$python" -m pytest -p no:cacheprovider "$@" || { status=$?; cat "$stage"/race.* 2>/dev/null; exit $status; }
