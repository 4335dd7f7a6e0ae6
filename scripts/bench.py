"""What the benchmarks share: a random model in memory, timing in turns, peak memory."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch

from rwkv_es.model.forward import Model
from rwkv_es.model.layout import HEAD_SIZE, expected_shapes
from rwkv_es.pretrained.checkpoint import Arch, load, resolve


def random_model(n_layer: int, n_embd: int, n_vocab: int) -> Model:
    """Make an fp32 model of the official layout with values that keep activations of order 1."""
    ranks = (64, 64, 32, 128) if n_embd >= 768 else (n_embd // 8, n_embd // 8, 16, n_embd // 4)
    arch = Arch(n_layer, n_embd, n_embd // HEAD_SIZE, HEAD_SIZE, n_vocab, 4 * n_embd, *ranks)
    generator = torch.Generator().manual_seed(0)
    params = {}
    for name, shape in expected_shapes(arch).items():
        values = torch.randn(shape, generator=generator)
        is_matrix = len(shape) == 2 and not name.endswith("r_k")
        params[name] = values * shape[-1] ** -0.5 if is_matrix else 1 + 0.1 * values
    return Model(params, arch)


def given_model(path: str) -> Model:
    """Load a checkpoint as fp32."""
    params, arch = load(resolve(path))
    return Model({name: tensor.float().clone() for name, tensor in params.items()}, arch)


def medians_in_turns(calls: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Run the calls in turns, so that a change of the machine's speed meets all of them; median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
