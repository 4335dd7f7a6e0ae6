"""What the GPU kernels become: compiled for a GPU that need not be here, with registers, spills and instructions.

    python scripts/gpu_compile.py sm_90                         # 7.2B's sizes, one JSON line a kernel
    python scripts/gpu_compile.py gfx942 --dim 2048 --ffn 8192 --rank 4 --state fp16

Instructions are those of the compiled code, each counted once; warp instructions are these times the warps. `branches`
are those before the last load of a head's state. Triton brings the tools; of AMD's code its text is counted.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from rwkv_es.gpu import kernels as layer_kernels
from rwkv_es.gpu import loop_kernels, product_kernels, prompt_kernels
from rwkv_es.gpu.operands import LayerNoise, LayerVectors, Reading, Texts, Work, layout_of
from rwkv_es.gpu.slots import AT_ONCE
from rwkv_es.model.layers import MATRICES
from rwkv_es.noise import gpu_kernels as noise_kernels

ARCHITECTURES = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)")


class Sizes(NamedTuple):
    """Of a layer, and of what perturbs it."""

    dim: int = 4096
    ffn: int = 16384
    halves: tuple[int, int, int, int] = (128, 128, 96, 480)  # between the pairs w a v g
    rank: int = 1
    state: torch.dtype = torch.float32
    dtype: torch.dtype = torch.bfloat16
    is_perturbed: bool = True


class AbsentGpu:
    """What Triton asks a driver for while it compiles."""

    def __init__(self, architecture: str) -> None:
        self.target = GPUTarget(*ARCHITECTURES[architecture])

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Return a number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return a number."""
        return 0


def report(architecture: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Compile every kernel and return what it became. Nothing is run."""
    driver.set_active(AbsentGpu(architecture))
    found: list[dict[str, Any]] = []

    def compile_only(self: Any, grid: Any) -> Any:
        def call(*args: Any, **options: Any) -> None:
            compiled = self.run(*args, grid=grid, warmup=True, **options)
            warps = compiled.metadata.num_warps
            found.append({"kernel": self.fn.__name__, "gpu": architecture, "warps": warps, **_facts(compiled)})

        return call

    JITFunction.__getitem__ = compile_only
    call_all(sizes, has_fp8=architecture == "sm_90")
    return found


def call_all(sizes: Sizes, rows: int = 8, device: str = "cpu", *, has_fp8: bool = False) -> None:
    """Call each kernel with operands of these sizes; has_fp8: those too that need a GPU with fp8."""
    for call in calls_of(sizes, rows, device).values():
        call()

    def of(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=sizes.dtype, device=device)

    call_loop(sizes, rows, device)
    call_texts(sizes, rows, device)
    directions = torch.zeros(8, dtype=torch.int64, device=device)
    noise_kernels.fill_from_table(of(8, sizes.ffn), 0, directions, (1, 2, 3), of(256))
    values = torch.zeros(4096, device=device)
    noise_kernels.round_to_bf16(values.bfloat16(), values, 0, 1, (2, 3))
    noise_kernels.move_on_grid(values.to(torch.int8), values, 0, 1, (2, 3))
    if has_fp8:
        noise_kernels.round_to_fp8(of(rows, sizes.ffn), of(rows, sizes.ffn).to(torch.float8_e4m3fn), of(rows))


def calls_of(sizes: Sizes, rows: int, device: str) -> dict[str, Callable[[], None]]:
    """Return a call of each of a layer's kernels."""
    kernels, c = layer_kernels, sizes.dim
    noise = layer_noise(sizes, rows, device)

    def of(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=sizes.dtype, device=device)

    layer = LayerVectors(of(2, 2, c), of(6, c), of(8, c), of(c))
    work = Work(of(6, rows, c), of(7, rows, c), of(rows, c))
    x, shift, state = of(rows, c), of(rows, c), torch.zeros(rows, c // 64, 64, 64, dtype=sizes.state, device=device)
    halves, hidden = [of(rows, width) for width in sizes.halves], of(rows, sizes.ffn)
    return {
        "norm_and_mix": lambda: kernels.norm_and_mix(x, shift, layer, work.mixed, noise),
        "project_down": lambda: product_kernels.project_down(
            work.mixed, [of(c, n) for n in sizes.halves], tuple(halves)
        ),
        "activate_pairs": lambda: kernels.activate_pairs(*halves, noise),
        "update_state": lambda: kernels.update_state(state, work, layer, False, noise),
        "norm_and_shift": lambda: kernels.norm_and_shift(x, shift, layer, work.mixed[0], noise),
        "square_relu": lambda: kernels.square_relu(hidden, noise),
        "add_ffn_value": lambda: kernels.add_ffn_value(x, noise),
    }


def call_texts(sizes: Sizes, rows: int, device: str) -> None:
    """Call the kernels that read 16 tokens of each of some rows at once."""
    num, c = AT_ONCE * rows, sizes.dim

    def of(*shape: int, dtype: torch.dtype = sizes.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    noise, numbers = layer_noise(sizes, num, device), of(rows, dtype=torch.int32)
    texts, layer = Texts(of(rows, dtype=torch.int64), numbers), LayerVectors(of(2, 2, c), of(6, c), of(8, c), of(c))
    work, x, read = Work(of(6, num, c), of(7, num, c), of(num, c)), of(num, c), (texts, noise)
    prompt_kernels.norm_and_mix(x, of(rows, c), layer, work.mixed, read)
    state = of(rows, c // 64, 64, 64, dtype=sizes.state)
    prompt_kernels.update_state(state, work, layer, False, read)
    prompt_kernels.norm_and_shift((x, of(num, c)), of(rows, c), layer, work.mixed, read)
    reading = Reading(texts, noise.direction, noise.direction, noise.sign, noise.live)
    loop_kernels.choose_texts(reading, slots_of(sizes, rows, device), of(rows, 3, dtype=torch.int32))


def slots_of(sizes: Sizes, rows: int, device: str) -> loop_kernels.Slots:
    """Return slots where nobody is."""
    numbers, words = torch.zeros(rows, 4, dtype=torch.int64, device=device), torch.zeros(rows, 64, device=device).int()
    columns, sign = [words[:, 0].clone() for _ in range(4)], torch.zeros(rows, dtype=sizes.dtype, device=device)
    return loop_kernels.Slots(*columns, numbers[:, 0].clone(), sign, numbers, words, words)


def call_loop(sizes: Sizes, rows: int, device: str) -> None:
    """Call the kernels of the token loop."""

    def of(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(rows, *shape, dtype=dtype, device=device)

    slots, tokens = slots_of(sizes, rows, device), of(dtype=torch.int64)
    choice = loop_kernels.Choice(of(65536, dtype=torch.float32), slots.counter[0, :2], 65529, 1.0, 0)
    loop_kernels.choose_tokens(tokens, slots)
    loop_kernels.write_tokens(slots.live, slots, choice)
    loop_kernels.note_tokens(slots.live, slots, tokens, choice)
    loop_kernels.admit(slots, of(loop_kernels.NUM_COLUMNS + 64))
    states = torch.zeros(2, rows, sizes.dim // 64, 64, 64, dtype=sizes.state, device=device)
    loop_kernels.copy_rows(states, states, of(2, dtype=torch.int64))


def layer_noise(sizes: Sizes, rows: int, device: str) -> LayerNoise:
    """Return noise of a layer that is not the first."""
    c, num = sizes.dim, len(MATRICES)
    into = [c] * 8 + list(sizes.halves) + [c, sizes.ffn]
    out = [c] * 4 + list(sizes.halves) + [c] * 4 + [sizes.ffn, c]
    place, width = [-1] * (2 * num), 0
    for m in range(num if sizes.is_perturbed else 0):
        for at, side in ((m, into[m]), (num + m, out[m])):
            place[at], width = width, width + -(-side // 16) * 16
    return LayerNoise(
        torch.zeros(2, sizes.rank, max(width, 1), dtype=torch.bfloat16, device=device),
        torch.zeros(num, device=device),
        torch.zeros(rows, dtype=torch.int64, device=device),
        torch.zeros(rows, dtype=sizes.dtype, device=device),
        torch.ones(rows, dtype=torch.int32, device=device),
        torch.zeros(rows, num, sizes.rank, device=device),
        torch.zeros(rows, layer_kernels.parts_of(sizes.ffn), sizes.rank, device=device),
        layout_of(sizes.rank, max(width, 1), place),
    )


def _facts(compiled: Any) -> dict[str, Any]:
    return _amd_facts(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _nvidia_facts(compiled.asm["cubin"])


def _nvidia_facts(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    lines = [found.groups() for line in listing.splitlines() if (found := _OPCODE.match(line))]
    ends = [i for i, (when, op) in enumerate(lines) if op == "BRA" and not when]  # the last one jumps to itself
    lines = lines[: ends[-1] if ends else len(lines)]
    operations = [op for _, op in lines]
    loads = [i for i, op in enumerate(operations) if op.startswith("LDG") and "128" in op]
    return {
        "registers": used.get("REG"),
        "spills_bytes": used.get("STACK", 0) + used.get("LOCAL", 0),
        "shared_bytes": used.get("SHARED", 0),
        "instructions": sum(op != "NOP" for op in operations),
        "barriers": sum(op.startswith(("BAR", "WARPSYNC")) for op in operations),
        "loads": sum(op.startswith("LDG") for op in operations),
        "loads_of_16_bytes": len(loads),
        "branches": sum(op.startswith(("BRA", "BSSY", "BRX", "CALL")) for op in operations[: max(loads, default=0)]),
    }


def _amd_facts(text: str) -> dict[str, Any]:
    used = {
        name: int(number) for name, number in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_count):\s+(\d+)", text)
    }
    operations = re.findall(r"^\t([vs]_\w+|global_\w+|ds_\w+|buffer_\w+)", text, re.M)
    loads = [i for i, op in enumerate(operations) if op.endswith("load_dwordx4")]
    return {
        "registers": used.get("vgpr_count"),
        "spills_bytes": 4 * used.get("vgpr_spill_count", 0),
        "instructions": len(operations),
        "barriers": operations.count("s_barrier"),
        "loads": sum("load" in op and op.startswith(("global", "buffer")) for op in operations),
        "loads_of_16_bytes": len(loads),
        "branches": sum(op.startswith("s_cbranch") for op in operations[: max(loads, default=0)]),
    }


def _run(tool: str, *options: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *options], check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Print one JSON line a kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpu", choices=ARCHITECTURES)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=16384)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--state", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--unperturbed", action="store_true")
    options = parser.parse_args()
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    sizes = Sizes(dim=options.dim, ffn=options.ffn, rank=options.rank, is_perturbed=not options.unperturbed)
    sizes = sizes._replace(state=dtypes[options.state], dtype=dtypes[options.dtype])
    for facts in report(options.gpu, sizes):
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
