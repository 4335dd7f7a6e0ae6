"""Golden runs: three small trainings whose last bits are recorded, so that a change meant to change none can show it.

    python scripts/golden.py                 compares with what tests/golden.json has recorded for this platform
    python scripts/golden.py --write         records the results of this platform

The bits are those of a platform (processor, torch, numba, mode of MKL): each has an entry under a tag that names these.
"""

import argparse
import contextlib
import hashlib
import io
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "golden.json"
COMMAND = "python scripts/golden.py --write"
COMMON = (
    "--model tiny --task countdown_mini --seed 3 --population 8 --prompts 4 --max-new-tokens 40 --steps 3 --rank 1 "
    "--sigma 0.02 --lr 0.02 --slots 16 --eval-every 0 --snapshot-every 100 --reward-workers 0 --threads 1 "
    "--tracker none --device cpu"
)
SAMPLED = (
    "--targets matrices=1,vectors=0.5,head.weight=3,emb.weight=2 --samples 2 --temperature 1 --top-p 0.95 "
    "--schedule cosine --weight-decay 0.1 --fitness zscore --dtype fp32"
)
RUNS = {  # the third must end like the first: the number of processes changes no bit
    "plain": SAMPLED,
    "int8": "--targets matrices=1,head.weight=3 --quantize int8 --state-dtype fp16",
    "two_processes": SAMPLED,
}
# Read by the trained model: its likelihood shows differences in the last bits that change no sampled token.
TEXT = "4 9 8=36:\n\n4+9=13,+21-5\n9-4=5,+13-3*40\n4*9=36,+44-28\n4+8=12,+21-3\n8-4=4,+13-5*36<answer>(8-4)*9</answer>"
DIFFERS, UNRECORDED = 1, 3  # exit codes


def main(argv: list[str] | None = None) -> int:
    """Make the runs; compare or record. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="RUN", help=f"which runs: {', '.join(RUNS)} (default: all)")
    parser.add_argument("--write", action="store_true", help=f"record the results in {RECORD.name}")
    options = parser.parse_args(argv)
    names = options.names or list(RUNS)
    if unknown := set(names) - set(RUNS):
        parser.error(f"unknown run {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    results = {name: result_of(name) for name in names}
    tag, record = platform_tag(), json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    print(json.dumps({tag: results}, indent=1))
    if options.write:
        record[tag] = {**record.get(tag, {}), **results}
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    return compare(tag, record.get(tag, {}), results)


def compare(tag: str, recorded: dict[str, Any], results: dict[str, Any]) -> int:
    """Say which results are the recorded ones. Returns the exit code."""
    for name, result in results.items():
        if name not in recorded:
            print(f"golden: nothing is recorded of {name} on {tag}; record it by an unchanged checkout's: {COMMAND}")
        else:
            print(f"golden: {name} is {'the same' if recorded[name] == result else 'DIFFERENT'}")
    if any(name not in recorded for name in results):
        return UNRECORDED
    return 0 if all(recorded[name] == result for name, result in results.items()) else DIFFERS


def result_of(name: str) -> dict[str, Any]:
    """Make a run. Returns the weights' checksum after each step, a digest of the export, and a text's likelihood."""
    with tempfile.TemporaryDirectory() as folder:
        run, text = Path(folder) / "run", Path(folder) / "text.txt"
        text.write_text(TEXT, encoding="utf-8")
        train = ["train", *COMMON.split(), *RUNS[name].split(), "--run", str(run)]
        rwkv_launched(train) if name == "two_processes" else rwkv(train)
        exported = run / "rwkv7-tiny.pth"
        said = rwkv(["eval", str(exported), "--text", str(text), "--threads", "1", "--device", "cpu"])
        steps = [json.loads(line) for line in (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
        return {
            "checksums": [step["checksum"] for step in steps],
            "export": digest(exported),
            "nll_per_token": json.loads(said.splitlines()[-1])["nll_per_token"],
        }


def rwkv(arguments: list[str]) -> str:
    """Run a command line in this process. Returns what it printed."""
    from rwkv_es.cli import main as rwkv_es

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = rwkv_es(arguments)
    if code:
        raise SystemExit(f"golden: this failed with code {code}: rwkv-es {' '.join(arguments)}")
    return printed.getvalue()


def rwkv_launched(arguments: list[str]) -> None:
    """Run a command line in two processes that the launcher starts."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "scripts/launch/cpu.yaml"]
    subprocess.run([*launcher, "-m", "rwkv_es", *arguments], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def digest(checkpoint: Path) -> str:
    """Return 16 hex digits of a checkpoint's tensors: names, shapes, dtypes and bytes, in their order."""
    import torch

    seen = hashlib.sha256()
    for name, tensor in torch.load(checkpoint, map_location="cpu", weights_only=True).items():
        seen.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        seen.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()[:16]


def platform_tag() -> str:
    """Name what the last bits depend on. Call it after a run: commands may choose MKL's mode when they start."""
    import llvmlite.binding
    import numba
    import torch

    processor = f"{platform.system()}-{platform.machine()} {llvmlite.binding.get_host_cpu_name()}"
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{processor} {isa} torch-{torch.__version__} numba-{numba.__version__} MKL_CBWR={mkl_mode()}"


def mkl_mode() -> str:
    """Return the mode of MKL's reproducibility that is in force in this process, as MKL itself reports it.

    The environment tells less: MKL reads MKL_CBWR at its first product, and replaces what a processor has not.
    """
    import ctypes

    import torch

    library = next(iter((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")), None)
    try:
        mode = ctypes.CDLL(str(library)).mkl_serv_cbwr_get(-1)  # -1: the branch with its flags
    except (AttributeError, OSError):  # a torch without MKL
        return "none"
    branch = {1: "off", 2: "auto", 3: "compatible"}.get(mode & 0xFFFF, f"branch{mode & 0xFFFF}")
    return branch + (",strict" if mode & 0x10000 else "")


if __name__ == "__main__":
    sys.exit(main())
