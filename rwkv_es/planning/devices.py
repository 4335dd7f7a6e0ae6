"""What devices can do: a table of GPUs, and the machine that this runs on. Needs no torch.

FLOP/s and bytes/s are those of the makers' data sheets (NVIDIA: A100, H100, H200, B200, L4, L40S and RTX A6000 data
sheets; GA102, Ada and RTX Blackwell white papers for the RTX cards): dense bf16 products that add up in fp32, and
memory bandwidth. What is left of them in long runs is 790 TFLOP/s and 3.0 TB/s on an H100, 4.3 TB/s on an H200: 0.8 and
0.9. Memory is what `nvidia-smi` shows as total.
"""

import os
import re
import resource
import subprocess
from pathlib import Path
from typing import NamedTuple

from rwkv_es.config.options import nearest
from rwkv_es.system.errors import ConfigError

_OF_PEAK_FLOPS, _OF_PEAK_BANDWIDTH = 0.8, 0.9
_MIB = 1 << 20


class Device(NamedTuple):
    """What a run's time depends on. Rates of 0 are not known."""

    name: str
    kind: str  # "cpu" or "cuda"
    memory: int  # bytes, for one process
    flops: float = 0.0  # of matrix products, a second
    bandwidth: float = 0.0  # bytes read and written, a second
    head_flops: float = 0.0  # of the head's product, all that a logit costs included; 0: follows from the others
    updates: float = 0.0  # weights moved by an update, a second; 0: follows from the others
    tick_s: float = 0.0  # what a tick takes besides
    is_measured: bool = False


def _gpu(name: str, mib: int, teraflops: float, terabytes: float) -> Device:
    rates = (teraflops * 1e12 * _OF_PEAK_FLOPS, terabytes * 1e12 * _OF_PEAK_BANDWIDTH)
    return Device(name, "cuda", mib * _MIB, *rates, tick_s=2e-3)  # a tick's share of Python, between two kernels


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("l4-24", 23034, 121, 0.300),
        _gpu("rtx3090-24", 24576, 71, 0.936),
        _gpu("rtx4090-24", 24564, 165, 1.008),
        _gpu("rtx5090-32", 32607, 209, 1.792),
        _gpu("a100-40", 40960, 312, 1.555),
        _gpu("a6000-48", 49140, 155, 0.768),
        _gpu("l40s-48", 46068, 362, 0.864),
        _gpu("a100-80", 81920, 312, 2.039),
        _gpu("h100-80", 81559, 989, 3.35),
        _gpu("h200-141", 143771, 989, 4.8),
        _gpu("b200-180", 183359, 2250, 8.0),
    )
}


def devices_of(spec: str) -> tuple[int, Device]:
    """Read "8xh100-80", "h200-141" or "2x24gb" (memory alone): how many devices, of which kind.

    Raises:
        ConfigError: no such device.
    """
    number, name = re.fullmatch(r"(?:(\d+)\s*[x*×]\s*)?(.*)", spec.strip().lower(), re.DOTALL).groups()  # type: ignore[union-attr]
    if int(number or 1) < 1:
        raise ConfigError(f"gpus must name one device or more; got {spec!r}")
    memory = re.fullmatch(r"(\d+)\s*gb?", name)
    if memory:
        return int(number or 1), Device(f"GPU of {memory[1]} GB", "cuda", int(memory[1]) * 10**9)
    if name not in GPUS:
        raise ConfigError(f"gpus: {name!r} is not in the table (memory alone will do: 2x24gb); {nearest(name, GPUS)}")
    return int(number or 1), GPUS[name]


def here(wanted: str = "auto") -> tuple[int, Device]:
    """Return what this machine has: its GPUs, where there are any and `wanted` (as --device) allows, else its CPU."""
    found = _nvidia() if not wanted.startswith("cpu") else []
    if not found:
        return 1, Device("this CPU", "cpu", available_memory())
    name, mib = found[0]
    plain = name.lower().replace(" ", "")
    alike = [
        gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in plain and abs(gpu.memory / _MIB - mib) < 0.1 * mib
    ]
    known = max(alike, key=lambda gpu: len(gpu.name), default=Device(name, "cuda", 0))  # an L40S is no L4
    return len(found), known._replace(name=name, memory=mib * _MIB)


def available_memory() -> int:
    """Return how much memory this process may hold in all: what the system has left, or what limits allow."""
    left = _kilobytes("/proc/meminfo", "MemAvailable") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = _kilobytes("/proc/self/status", "RssAnon")
    left += own
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    left = left if most == resource.RLIM_INFINITY else min(left, most)
    try:
        group = Path("/sys/fs/cgroup")
        limit = own + int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no limit ("max"), or no such file
        return left
    return min(left, max(limit, 0))


def num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kilobytes(path: str, name: str) -> int:
    """Read a size from one of Linux's status files, in bytes; 0: there is no such file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)


def _nvidia() -> list[tuple[str, int]]:
    """Return name and memory (MiB) of each GPU, as nvidia-smi says."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        rows = [line.rsplit(",", 1) for line in text.splitlines() if line.strip()]
        return [(name.strip(), int(memory)) for name, memory in rows]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
