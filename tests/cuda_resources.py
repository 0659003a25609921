"""Registers, stack and shared memory of every kernel in the built CUDA extension.

python tests/cuda_resources.py            # print what the extension has
python tests/cuda_resources.py --update   # and make it the baseline, tests/cuda_resources.json
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

BASELINE = Path(__file__).with_suffix(".json")


def tool(name: str) -> str | None:
    """A binary utility of CUDA: on PATH, in the toolkit, or inside the triton package."""
    places = [name, f"/usr/local/cuda/bin/{name}"]
    if spec := importlib.util.find_spec("triton"):
        places.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name))
    return next((found for place in places if (found := shutil.which(place))), None)


def extension() -> Path | None:
    import mdkernels

    return next(iter(Path(mdkernels.__file__).parent.glob("_cuda*.so")), None)


def usage(cuobjdump: str, library: Path) -> dict[str, dict[str, dict[str, int]]]:
    """{architecture: {kernel: {"reg": ..., "stack": ..., "local": ...}}}"""
    text = subprocess.run(
        [cuobjdump, "-res-usage", str(library)], capture_output=True, text=True, check=True
    ).stdout
    text = subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout
    found, architecture, kernel = {}, None, None
    for line in text.splitlines():
        if match := re.match(r"arch = (\S+)", line.strip()):
            architecture = match[1]
        elif match := re.match(r"Function (.+):$", line.strip()):
            # Less the return type, the namespaces and the arguments.
            kernel = re.sub(r"\(anonymous namespace\)::|mdk::|^void ", "", match[1])
            kernel = kernel[: kernel.rindex("(")] if "(" in kernel else kernel
        elif "REG:" in line:
            numbers = {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
            found.setdefault(architecture, {})[kernel] = numbers
    return found


def main() -> None:
    sys.path.insert(0, str(BASELINE.parents[1]))  # this checkout, whatever is installed
    cuobjdump, library = tool("cuobjdump"), extension()
    if cuobjdump is None or library is None:
        sys.exit("needs cuobjdump (CUDA toolkit or triton) and a built mdkernels._cuda")
    found = usage(cuobjdump, library)
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    print(text, end="")
    if "--update" in sys.argv:
        BASELINE.write_text(text)


if __name__ == "__main__":
    main()
