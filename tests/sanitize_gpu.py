"""compute-sanitizer over every operator and GPU backend on tiny shapes:
`python tests/sanitize_gpu.py [--tools memcheck ...] [--out DIR]`.

Where the tool is missing or refuses the device, this says why and ends with status 0: some virtual
machines give it no access. Every allocation is a cudaMalloc of its own, or an access beyond a
tensor would land in the block that torch caches around it.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PROBE = "import torch; print(torch.arange(8, device='cuda').sum().item())"
ROWS, VOCABS = 3, (67, 1003)


def find_tool() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


def work() -> None:
    """Every op once, forward and backward: the program that the tools watch."""
    import torch
    from helpers import problem, variants

    import mdkernels

    device, ran = "cuda", []

    def note(op: str, backend: str) -> None:
        torch.cuda.synchronize()
        ran.append(f"{op}:{backend}")

    for vocab in VOCABS:
        for dtype in (torch.float32, torch.bfloat16):
            p = problem("peaked", 8, vocab, dtype)
            targets, labels = p.targets.to(device), p.labels.to(device)
            for variant in (v for v in variants("sparse_kl") if v.device == device):
                for inplace in (False, True):
                    z = p.logits.to(device).requires_grad_() * 1
                    mdkernels.sparse_kl(
                        z, targets, labels, inplace=inplace, backend=variant.backend
                    ).loss.backward()
                note("sparse_kl", variant.backend)
            for variant in (v for v in variants("token_logprobs") if v.device == device):
                z = p.logits.to(device).requires_grad_()
                mdkernels.token_logprobs(z, labels, backend=variant.backend).sum().backward()
                note("token_logprobs", variant.backend)
            base, memory = (torch.randn(ROWS, vocab, device=device).to(dtype) for _ in range(2))
            seeds = torch.arange(ROWS, device=device)
            for op, options in (
                ("logit_mix", {}),
                ("mix_argmax", {}),
                ("mix_sample", {"seeds": seeds, "return_logprobs": True}),
                ("mix_sample", {"seeds": seeds, "top_k": 20, "top_p": 0.9, "min_p": 0.01}),
            ):
                for variant in (v for v in variants(op) if v.device == device):
                    getattr(mdkernels, op)(base, memory, 0.3, backend=variant.backend, **options)
                    note(op, variant.backend)
    places = torch.randn(2, 3, 400, device=device)
    ids = torch.randint(0, 400, (2, 2), device=device)
    for variant in (v for v in variants("mix_verify") if v.device == device):
        options = {"seeds": 1, "backend": variant.backend}
        mdkernels.mix_verify(places, places.flip(1), 0.3, ids, **options)
        for sampling in ({"temperature": 0.7}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}):
            mdkernels.mix_verify(places, places.flip(1), 0.3, ids, **sampling, **options)
        note("mix_verify", variant.backend)
    distances = torch.rand(ROWS, 130, device=device)
    ids = torch.randint(0, 400, (ROWS, 130), device=device)
    values = torch.randint(0, 60, (400,), device=device)
    for variant in (v for v in variants("knn_targets") if v.device == device):
        mdkernels.knn_targets(distances, ids, values, temperature=0.3, backend=variant.backend)
        note("knn_targets", variant.backend)
    print("ran", " ".join(dict.fromkeys(ran)) or "nothing")


def left(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


def sanitize(tool: str, program: list[str], compute_sanitizer: str, out: Path, deadline: float):
    """(summary line, ok) of one tool."""
    log = out / f"{tool}.log"
    command = [compute_sanitizer, "--tool", tool, "--error-exitcode", "97", *program]
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1", CUDA_LAUNCH_BLOCKING="1")
    with log.open("w") as sink:
        try:
            status = subprocess.run(
                command, env=environment, stdout=sink, stderr=sink, timeout=left(deadline)
            ).returncode
        except subprocess.TimeoutExpired:
            return f"{tool}: not at its end when time ran out (--seconds), see {log}", False
    text = log.read_text(errors="replace")
    summary = re.findall(r"={9} (.*SUMMARY.*)", text)
    ran = re.findall(r"^ran (.*)$", text, re.MULTILINE)
    verdict = "; ".join(dict.fromkeys(summary)) or f"status {status}, no summary"
    ok = status == 0 and bool(ran) and ran[-1] != "nothing"
    if not ok:
        verdict += "\n" + "\n".join(f"    {line}" for line in text.splitlines()[:40])
    return f"{tool}: {verdict} (ran {ran[-1] if ran else 'nothing'}), see {log}", ok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), metavar="TOOL")
    parser.add_argument("--seconds", type=float, default=540.0, help="limit of all together")
    parser.add_argument("--out", type=Path, help="where the logs go")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work()
        return
    out = args.out or Path(tempfile.mkdtemp(prefix="gpu-sanitizer-"))
    out.mkdir(parents=True, exist_ok=True)
    tool = find_tool()
    if tool is None:
        print("compute-sanitizer: not run: it is not on the PATH nor under CUDA_HOME/bin")
        return
    deadline = time.monotonic() + args.seconds
    probe = [tool, "--error-exitcode", "97", sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, timeout=left(deadline))
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    except subprocess.TimeoutExpired:
        done, said = None, [f"no end within {args.seconds:.0f} s"]
    if done is None or done.returncode != 0:
        print("compute-sanitizer: not run: it fails on one line of torch here:")
        print("\n".join(f"    {line}" for line in said[:8]))
        return
    program = [sys.executable, str(Path(__file__).resolve()), "--work"]
    # Compiles what is compiled at run time, and shows plain errors as such.
    plain = subprocess.run(program, capture_output=True, text=True, timeout=left(deadline))
    if plain.returncode != 0:
        sys.exit(f"the program fails without the sanitizer:\n{plain.stdout}{plain.stderr}")
    with concurrent.futures.ThreadPoolExecutor(len(args.tools)) as pool:
        pending = [pool.submit(sanitize, name, program, tool, out, deadline) for name in args.tools]
        results = [future.result() for future in pending]
    for line, _ in results:
        print(line)
    sys.exit(0 if all(ok for _, ok in results) else 1)


if __name__ == "__main__":
    main()
