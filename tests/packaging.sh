#!/usr/bin/env bash
# Builds an sdist and from it a wheel, both isolated, installs the wheel next to the torch of PYTHON
# and uses it from outside the source tree: what a user gets, not what the checkout has.
set -euo pipefail
python=$(realpath -s "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/direct" "$root"
"$python" - "$root" "$work" <<'PY'
import os, subprocess, sys
root, work = sys.argv[1:]
os.chdir(root)
# The backend's own hook: no extra package is needed to make an sdist.
script = f"import setuptools.build_meta as b; print(b.build_sdist({work!r}))"
subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
PY
# The wheel above has the CUDA part where there is an nvcc; building that once is enough.
MDK_CUDA=OFF "$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/from-sdist" "$work"/*.tar.gz

"$python" - "$work"/direct/*.whl "$work"/from-sdist/*.whl <<'PY'
import sys, zipfile
for wheel in sys.argv[1:]:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    built = b"CUDA = 'built'" in archive.read("mdkernels/_build_info.py")
    assert any("_cuda" in n and n.endswith(".so") for n in names) == built, f"_cuda in {wheel}"
    assert any("_cpu" in n and n.endswith(".so") for n in names), f"no _cpu in {wheel}"
    assert "mdkernels/ops/sparse_kl/README.md" in names, f"no op READMEs in {wheel}"
PY

"$python" -m pip install --quiet --no-deps --no-compile --target "$work/site" "$work"/from-sdist/*.whl
cd "$work"
PYTHONPATH="$work/site" "$python" - <<'PY'
import mdkernels, torch
from mdkernels.ops import native

assert "/site/" in mdkernels.__file__, mdkernels.__file__
assert native.load("_cpu").module is not None, native.load("_cpu").reason
logits = torch.randn(3, 11, requires_grad=True)
labels = torch.tensor([1, 2, 3])
targets = mdkernels.SparseTargets.from_dense(torch.eye(3, 11))
mdkernels.sparse_kl(logits, targets, labels, backend="cpu").loss.backward()
assert logits.grad.isfinite().all()
PY
echo "packaging: sdist and wheels are complete"
