"""What computes the tokens of a loop: the reference in plain torch, or an engine that does the same faster."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import Tensor

from rwkv_es.cpu import engine as cpu
from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.gpu import engine as gpu
from rwkv_es.gpu import trial as gpu_trial
from rwkv_es.model import forward as torch_engine
from rwkv_es.model.batch import Verdict, examine
from rwkv_es.model.forward import Model, State
from rwkv_es.model.layout import Arch
from rwkv_es.model.weights import Factors, Weights
from rwkv_es.system.errors import ConfigError

_SAID: set[str] = set()  # on stderr
_NEEDS = {
    "numba": "a CPU, numba, fp32 weights",
    "triton": "a GPU, Triton, fp32 or bf16 weights",
}


class Engine(Protocol):
    """What computes: `model.forward` is the reference, the others do the same faster."""

    can_read_ahead: bool  # reading many tokens of one row at once has the bits of one after the other

    def forward(self, weights: Weights, arch: Arch, tokens: Tensor, state: State) -> Tensor:
        """Read one token per row, (S,) int64 -> (S,C); updates the state (S rows) in place. One row: (T,) tokens."""

    def logits(self, weights: Weights, x: Tensor) -> Tensor:
        """Apply the LM head: (S,C) -> (S,V) fp32."""


def examined(model: Model, decoding: GenerationConfig, factors: Factors | None = None) -> Verdict:
    """Find out how many rows this machine's products need, as the engine makes them, for the same bits in any company.

    factors: of any directions of the targets that will be perturbed.
    """
    is_fused = decoding.engine in ("auto", "numba") and cpu.is_able(model, factors)
    rank = max((a.shape[-1] for a in factors.a.values()), default=1) if factors is not None else 1
    return examine(model, decoding.slots, decoding.threads, is_fused=is_fused, rank=rank)


@contextmanager
def engine_of(model: Model, decoding: GenerationConfig, factors: Factors | None) -> Iterator[Engine]:
    """Choose what computes `forward` and `logits`: fused kernels of the CPU or GPU if they can, else plain torch.

    The GPU's are compared with plain torch first, once per process; a line on stderr says why they are not used.

    Raises:
        ConfigError: the engine that was asked for cannot run this model under these perturbations.
    """
    name = decoding.engine
    if name == "auto":
        name = "numba" if cpu.is_able(model, factors) else "torch"
        if model.like.device.type == "cuda":
            name = "torch" if _says_why_not(model, factors) else "triton"
    is_able, running = ENGINES[name]
    if not is_able(model, factors):
        raise ConfigError(f"engine {name} needs {_NEEDS[name]}, and matrices as targets; try --engine auto")
    with running(model, factors, decoding) as engine:
        yield engine


def _says_why_not(model: Model, factors: Factors | None) -> bool:
    """Say on stderr, once for each reason, why the GPU's kernels are not used; return whether there is a reason."""
    reason = gpu_trial.reason_against(model, factors)
    if reason and reason not in _SAID:
        _SAID.add(reason)
        print(f"rwkv-es: plain torch is used on the GPU, several times slower than Triton: {reason}", file=sys.stderr)
    return bool(reason)


@contextmanager
def _plain_torch(*_: object) -> Iterator[Engine]:
    yield torch_engine


# Each says whether it can run a model under some factors, and runs it for a way of decoding.
ENGINES: dict[str, tuple[Callable[..., bool], Callable[..., AbstractContextManager[Engine]]]] = {
    "torch": (lambda model, factors: True, _plain_torch),
    "numba": (cpu.is_able, lambda model, factors, d: cpu.running(model, factors, d.threads, d.row_multiple)),
    "triton": (gpu.is_able, lambda model, factors, d: gpu.running(model, factors, d.padded(d.slots))),
}
