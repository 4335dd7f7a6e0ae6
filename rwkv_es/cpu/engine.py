"""The CPU engine: `model.forward` by fused kernels around plain matrix products, rows in blocks that fit the cache."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_es.model.batch import MULTIPLES, shares
from rwkv_es.model.forward import Model, State, layer_norm, new_state
from rwkv_es.model.layers import (
    MATRICES,
    VECTORS,
    announced,
    are_covered,
    half_widths,
    layer_params,
    pack,
    pack_vectors,
)
from rwkv_es.model.layout import Arch, Params
from rwkv_es.model.weights import Factors, Weights

try:
    from rwkv_es.cpu import kernels
    from rwkv_es.noise.compiled import num_compiled
except ImportError:  # numba is missing or does not fit the installed numpy
    kernels = None  # type: ignore[assignment]

ROWS_PER_BLOCK = 256  # measured: smaller blocks pay more calls than they save in cache misses
FEWEST_ROWS = 32  # for a thread of its own
_COMPILING = "rwkv-es: compiling the CPU kernels, once on this machine; this takes about half a minute ..."


class Layer(NamedTuple):
    """A layer's parameters in the kernels' order."""

    vectors: np.ndarray  # (19,C), in the order of layers.VECTORS
    matrices: tuple[Any, ...]  # views as (in,out), in the order of layers.MATRICES; None: not used


class Perturbation(NamedTuple):
    """A layer's factors of all directions (see `kernels.LayerNoise`)."""

    block: np.ndarray
    place: np.ndarray
    scale: np.ndarray
    vectors: np.ndarray
    vector_place: np.ndarray
    vector_scale: np.ndarray


class Scratch(NamedTuple):
    """A thread's buffers for one block of R rows; every array lies over the memory of its tensor."""

    operands: tuple[Tensor, ...]  # (R,C) six times: r k v w a g; the first one later holds y
    products: tuple[Tensor, ...]  # (R,C) seven times: r k v, then the pairs' w a v g
    halves: tuple[Tensor, ...]  # between the pairs w a v g: (R,rank) each
    hidden: Tensor  # (R,F)
    work: Any  # kernels.Work over operands and products
    half_arrays: tuple[np.ndarray, ...]
    hidden_array: np.ndarray
    coefficient: np.ndarray  # (R,NUM_MATRICES,r)
    own: np.ndarray  # (NUM_VECTORS,C)


def is_able(model: Model, factors: Factors | None) -> bool:
    """Say whether this engine can run a model under these perturbations."""
    like = model.params["emb.weight"]
    if kernels is None or like.device.type != "cpu" or like.dtype != torch.float32:
        return False
    return are_covered(factors, (*MATRICES, *VECTORS))


class Rows(NamedTuple):
    """Some rows and all that belongs to them, as arrays over the same memory as the tensors."""

    x: Tensor  # (S,C), in place
    att_shift: np.ndarray  # (L,S,C)
    wkv: np.ndarray  # (L,S,H,K_h,K_h)
    ffn_shift: np.ndarray  # (L,S,C)
    direction: np.ndarray  # (S,)
    sign: np.ndarray  # (S,)

    def part(self, start: int, stop: int) -> "Rows":
        """Return views of rows start..stop-1; a state of one row stays whole, since all of them are its tokens."""
        rows = slice(start, stop) if self.wkv.shape[1] == len(self.x) else slice(None)
        att_shift, wkv, ffn_shift = (array[:, rows] for array in (self.att_shift, self.wkv, self.ffn_shift))
        return Rows(self.x[start:stop], att_shift, wkv, ffn_shift, self.direction[start:stop], self.sign[start:stop])


class FusedEngine:
    """`model.forward` and `model.logits` for one set of factors, with the same results up to rounding.

    Rows are shared out to threads. Made by `running`.
    """

    can_read_ahead = True

    def __init__(self, model: Model, factors: Factors | None, num_threads: int, row_multiple: int) -> None:
        self.model, self.row_multiple = model, row_multiple
        self.layers = [_layer(model.params, i) for i in range(model.arch.n_layer)]
        self.noise = [_pack(model, factors, i) for i in range(model.arch.n_layer)]
        rank = max(noise.block.shape[1] for noise in self.noise)
        self.scratch = [_scratch(model, rank) for _ in range(num_threads)]
        self.threads = ThreadPoolExecutor(num_threads)

    def forward(self, weights: Weights, _: Arch, tokens: Tensor, state: State) -> Tensor:
        """Read one token per row, or all tokens with one row, as `model.forward` does: (S,) -> (S,C)."""
        x = layer_norm(weights, weights.embed(tokens), "blocks.0.ln0")
        rows = _rows(x, weights, state)
        if state.wkv.shape[1] < len(x):
            self._run(rows, self.scratch[0])
        else:
            self._share_out(lambda start, stop, scratch: self._run(rows.part(start, stop), scratch), len(x))
        return layer_norm(weights, x, "ln_out")

    def logits(self, weights: Weights, x: Tensor) -> Tensor:
        """Apply the LM head: x (S,C) -> (S,V). The threads share out rows, or words if there are more of them."""
        head = weights.params["head.weight"]
        scores = torch.empty(len(x), len(head))

        def of_words(start: int, stop: int, _: Any) -> None:
            torch.mm(x, head[start:stop].t(), out=scores[:, start:stop])

        def of_rows(start: int, stop: int, _: Any) -> None:
            torch.mm(x[start:stop], head.t(), out=scores[start:stop])

        self._share_out(*((of_words, len(head)) if len(head) > len(x) else (of_rows, len(x))))
        return weights.perturbed(scores, x, "head.weight")

    def warm_up(self) -> None:
        """Compile the kernels, or load them from numba's cache: run them on rows that nobody looks at."""
        tokens, state = torch.zeros(self.row_multiple, dtype=torch.int64), new_state(self.model, self.row_multiple)
        self.forward(Weights(self.model.params), self.model.arch, tokens, state)

    def _share_out(self, work: Callable[[int, int, Callable[[int], Scratch]], None], num_rows: int) -> None:
        """Let the threads work on contiguous shares of rows (or words), each a full multiple: no row's bits change."""
        parts = shares(num_rows, len(self.scratch), self.row_multiple, FEWEST_ROWS)
        jobs = [(*part, scratch) for part, scratch in zip(parts, self.scratch)]
        others = [self.threads.submit(work, *job) for job in jobs[1:]]
        work(*jobs[0])
        for other in others:
            other.result()

    def _run(self, rows: Rows, scratch: Callable[[int], Scratch]) -> None:
        for start in range(0, len(rows.x), ROWS_PER_BLOCK):
            block = rows.part(start, min(start + ROWS_PER_BLOCK, len(rows.x)))
            buffers, x = scratch(len(block.x)), block.x.numpy()
            for i, (layer, noise) in enumerate(zip(self.layers, self.noise)):
                seen = kernels.LayerNoise(*noise, block.direction, block.sign, buffers.coefficient, buffers.own)
                kernels.norm_and_mix(x, block.att_shift[i], layer.vectors, buffers.work.mixed, seen)
                _time_mix_(layer, seen, block, buffers, i)
                kernels.norm_and_shift(x, block.ffn_shift[i], layer.vectors, buffers.work.mixed[0], seen)
                _channel_mix_(layer, seen, block, buffers)
                kernels.add_ffn_value(x, seen)


def _time_mix_(layer: Layer, noise: Any, rows: Rows, buffers: Scratch, i: int) -> None:
    """Add a layer's time mix to rows.x, all but the output matrix's perturbation."""
    matrices, operands, products = layer.matrices, buffers.operands, buffers.products
    for operand, matrix, product in zip(operands, matrices[kernels.R : kernels.OUT], products):
        torch.mm(operand, matrix, out=product)
    for j, matrix, half in zip((3, 4, 2, 5), matrices[kernels.W1 : kernels.W2], buffers.halves):
        if matrix is not None:
            torch.mm(operands[j], matrix, out=half)
    w, a, v, g = buffers.half_arrays
    kernels.activate_pairs(w, a, v, g, noise)
    for half, matrix, product in zip(buffers.halves, matrices[kernels.W2 : kernels.FFN_KEY], products[3:]):
        if matrix is not None:
            torch.mm(half, matrix, out=product)
    kernels.update_state(rows.wkv[i], buffers.work, layer.vectors, i == 0, noise)
    torch.addmm(rows.x, operands[0], matrices[kernels.OUT], out=rows.x)


def _channel_mix_(layer: Layer, noise: Any, rows: Rows, buffers: Scratch) -> None:
    """Add the channel mix to rows.x, all but the value matrix's perturbation."""
    torch.mm(buffers.operands[0], layer.matrices[kernels.FFN_KEY], out=buffers.hidden)
    kernels.square_relu(buffers.hidden_array, noise)
    torch.addmm(rows.x, buffers.hidden, layer.matrices[kernels.FFN_VALUE], out=rows.x)


def _rows(x: Tensor, weights: Weights, state: State) -> Rows:
    if weights.direction is None or weights.sign is None:
        direction, sign = np.zeros(len(x), np.int64), np.zeros(len(x), np.float32)
    else:
        direction, sign = weights.direction.numpy(), weights.sign.numpy()
    wkv = state.wkv.view(torch.uint16) if state.wkv.dtype == torch.float16 else state.wkv  # numba knows no fp16
    return Rows(x, state.att_shift.numpy(), wkv.numpy(), state.ffn_shift.numpy(), direction, sign)


def _layer(params: Params, i: int) -> Layer:
    found = layer_params(params, i)
    return Layer(found.vectors.numpy(), found.matrices)


def _pack(model: Model, factors: Factors | None, i: int) -> Perturbation:
    matrices, vectors = pack(factors, i), pack_vectors(model, factors, i)
    block = torch.zeros(1, 0, 0, dtype=torch.bfloat16) if matrices.block is None else matrices.block
    return Perturbation(*_arrays(block, matrices.place, matrices.scale), *_arrays(*vectors))


def _arrays(block: Tensor, place: list[int], scale: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return block.view(torch.uint16).numpy(), np.array(place, np.int64), np.array(scale, np.float32)


def _scratch(model: Model, rank: int) -> Callable[[int], Scratch]:
    """Return a function from a number of rows to buffers for them, all in the same memory."""
    c, f = model.arch.n_embd, model.arch.n_ffn
    widths = (6 * c, 7 * c, *half_widths(model), f, c)
    memory = [torch.empty(ROWS_PER_BLOCK * width) for width in widths]
    coefficient = np.zeros((ROWS_PER_BLOCK, kernels.NUM_MATRICES, rank), np.float32)
    own = np.empty((kernels.NUM_VECTORS, c), np.float32)
    heads = np.empty((max(kernels.HEADS_AT_ONCE, model.arch.n_head), 5 * kernels.K_H), np.float32)

    @cache
    def buffers(rows: int) -> Scratch:
        # Contiguous for every number of rows: numba compiles different code, with different bits, for strides.
        mixed, products, *halves, hidden, v_first = (m[: rows * w] for m, w in zip(memory, widths))
        mixed, products = mixed.view(6, rows, c), products.view(7, rows, c)
        halves = [half.view(rows, -1) for half in halves]
        hidden = hidden.view(rows, f)
        return Scratch(
            operands=mixed.unbind(),
            products=products.unbind(),
            halves=tuple(halves),
            hidden=hidden,
            work=kernels.Work(mixed.numpy(), products.numpy(), v_first.view(rows, c).numpy(), heads),
            half_arrays=tuple(half.numpy() for half in halves),
            hidden_array=hidden.numpy(),
            coefficient=coefficient[:rows],
            own=own,
        )

    return buffers


@contextmanager
def running(
    model: Model, factors: Factors | None, num_threads: int = 1, row_multiple: int = MULTIPLES[0]
) -> Iterator[FusedEngine]:
    """Start the engine; meanwhile torch itself has one thread, since its own would wait for work spinning."""
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    engine = FusedEngine(model, factors, num_threads, row_multiple)
    try:
        before = num_compiled()
        with announced(
            _COMPILING, lambda: num_compiled() > before
        ):  # what is kept on the disk is loaded without a word
            engine.warm_up()
        yield engine
    finally:
        engine.threads.shutdown()
        torch.set_num_threads(torch_threads)
