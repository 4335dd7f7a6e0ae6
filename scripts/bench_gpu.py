"""First and later measurements on a GPU: correctness, ceilings, products, kernels, ticks, sampling, update, a step.

    python scripts/bench_gpu.py                    # everything, sizes of 7.2B with random weights: under 9 minutes
    python scripts/bench_gpu.py check ticks --rows 256 1024 --rank 4
    CUBLAS_WORKSPACE_CONFIG=:16:8 CUBLASLT_WORKSPACE_SIZE=1 python scripts/bench_gpu.py products
    python scripts/bench_gpu.py check --sanitizer  # under compute-sanitizer (CUDA's toolkit), a small model: no error
    TRITON_INTERPRET=1 python scripts/bench_gpu.py --tiny      # a dry run without a GPU: nothing it prints is a figure

Prints one JSON line a figure: case, name, measured, unit, and where there are such, floor and predicted: for an H100
with 80 GB, by arithmetic; none of the predictions had been measured when they were written. Needs torch, Triton, numba.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import traceback

import gpu_cases
import torch
from gpu_bench import OF_7B, TINY, Bench, note

from rwkv_es.pretrained.load import multiply_alike

BUDGET_S = 540


def main() -> int:
    """Run the cases in turn; one that fails is reported and does not keep the others from running."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(gpu_cases.CASES)}; default: all")
    parser.add_argument("--tiny", action="store_true", help="a small model; on a CPU in Triton's interpreter")
    parser.add_argument("--rows", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--sanitizer", action="store_true", help="run the cases under compute-sanitizer's memcheck")
    options = parser.parse_args()
    if options.sanitizer:
        return sanitized(options.cases)
    unknown = [case for case in options.cases if case not in gpu_cases.CASES]
    if unknown or not (options.tiny or torch.cuda.is_available()):
        parser.error(f"unknown case {unknown[0]}" if unknown else "there is no GPU here; try --tiny")
    multiply_alike()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [8] if options.tiny else options.rows
    bench = Bench(TINY if options.tiny else OF_7B, rows, options.rank, device, options.tiny)
    began, num_failed = time.perf_counter(), 0
    for case in options.cases or gpu_cases.CASES:
        if time.perf_counter() - began > BUDGET_S:
            note(f"{case}: left out, {BUDGET_S} s are over")
            continue
        num_failed += not _run(bench, case)
    return 1 if num_failed else 0


def sanitized(cases: list[str]) -> int:
    """Run the cases with a small model under compute-sanitizer; say how to get it where it is not there."""
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", "--target-processes", "all"]
    command += [sys.executable, __file__, *cases, "--tiny"]
    if shutil.which(command[0]) is None:
        note(f"compute-sanitizer is not there; with CUDA's toolkit on PATH: {' '.join(command)}")
        return 2
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else it sees one large block
    return subprocess.run(command, check=False, env=environment).returncode


def _run(bench: Bench, case: str) -> bool:
    began = time.perf_counter()
    try:
        gpu_cases.CASES[case](bench)
    except Exception:  # noqa: BLE001  the other cases are worth having
        note(f"{case} failed:\n{traceback.format_exc()}")
        return False
    finally:
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        note(f"{case} took {time.perf_counter() - began:.1f} s")
    return True


if __name__ == "__main__":
    sys.exit(main())
