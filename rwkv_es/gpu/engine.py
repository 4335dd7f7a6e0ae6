"""The GPU engine: `model.forward` by Triton kernels around plain matrix products, repeated as CUDA graphs.

A step reads and writes at fixed addresses only and waits for nothing, so that it can be captured. The kernels are
proved value by value in Triton's interpreter; the speed of this engine has not been measured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.model.batch import MULTIPLES
from rwkv_es.model.forward import Model, State, forward, layer_norm, logits, new_state
from rwkv_es.model.layers import Matrix, announced, are_covered, half_widths, layer_params, pack, share_block_
from rwkv_es.model.layout import Arch
from rwkv_es.model.weights import Factors, Weights

_ALIGNED = 16  # values: factors are read 16 bytes at a time
CALLS_BEFORE_CAPTURE = 16  # of one number of rows: a graph pays only if it is repeated

Work = Callable[[], None]


class Layer(NamedTuple):
    """A layer's parameters in the kernels' order."""

    vectors: Any  # gpu_kernels.LayerVectors
    matrices: tuple[Any, ...]  # Matrix, in the order of gpu_kernels.MATRICES; None: not used
    is_first: bool


class Perturbation(NamedTuple):
    """A layer's factors of all directions (see `gpu_kernels.LayerNoise`)."""

    block: Tensor
    scale: Tensor
    layout: tuple[int, ...]


class Scratch(NamedTuple):
    """Buffers for S rows."""

    work: Any  # gpu_kernels.Work
    halves: tuple[Tensor, ...]  # between the pairs w a v g: (S,rank) each
    hidden: Tensor  # (S,F)
    coefficient: Tensor  # (S,NUM_MATRICES,r) fp32
    parts: Tensor  # (S,parts of F,r) fp32


class Rows(NamedTuple):
    """What one step reads and writes, at fixed addresses."""

    tokens: Tensor  # (S,) int64
    weights: Weights
    direction: Tensor  # (S,) int64
    sign: Tensor  # (S,)
    state: State
    out: Tensor  # (S,C)


class Step(NamedTuple):
    """A step for one number of rows of one state, and how to make it."""

    rows: Rows
    run: Work  # kept when it is captured: a graph writes to all that it holds, and keeps none of it alive
    repeat: Work | None  # the captured graph
    num_calls: int


@cache
def _import_kernels() -> tuple[Any, str]:
    """Import the kernels, and Triton, when they are first needed; else say what is missing."""
    try:
        from rwkv_es.gpu import kernels as gpu_kernels
    except ImportError as error:
        return None, str(error)
    return gpu_kernels, ""


def _kernels() -> Any:
    return _import_kernels()[0]


def what_is_missing() -> str:
    """Say why there are no kernels: Triton is not installed, or too old; "" if there are."""
    return _import_kernels()[1]


def is_able(model: Model, factors: Factors | None) -> bool:
    """Say whether this engine can run a model under these perturbations."""
    like = model.like
    if like.dtype not in (torch.float32, torch.bfloat16) or like.device.type not in ("cuda", "cpu"):
        return False
    kernels = _kernels()
    if kernels is None or (like.device.type == "cpu" and not kernels.IS_INTERPRETED):
        return False
    return are_covered(factors, kernels.MATRICES)


class GpuEngine:
    """`model.forward` and `model.logits` for one set of factors, with the same results up to rounding.

    Made by `running`. num_rows: the most rows of a step; the memory between its products is allocated once for them.
    capture: takes a step's work and returns what repeats it; None: every step is made anew.
    """

    can_read_ahead = False  # a text's tokens are not read at once with the bits of one by one

    def __init__(
        self, model: Model, factors: Factors | None, num_rows: int, capture: Callable[[Work], Work] | None
    ) -> None:
        self.model, self.capture, self.num_rows = model, capture, num_rows
        largest = max((model.params[name].numel() for name in model.scales if name.startswith("blocks.")), default=0)
        buffer = model.like.new_empty(largest)
        self.layers = [_layer(model, i, buffer) for i in range(model.arch.n_layer)]
        self.noise = [_pack(model, factors, i) for i in range(model.arch.n_layer)]
        self.memory = [model.like.new_empty(num_rows * width) for width in self._widths()]
        rank = max(noise.block.shape[1] for noise in self.noise)
        shapes = (len(_kernels().MATRICES), rank), (_kernels().parts_of(model.arch.n_ffn), rank)
        self.coefficients = [torch.zeros(num_rows, *shape, device=model.like.device) for shape in shapes]
        self.live = torch.ones(num_rows, dtype=torch.int32, device=model.like.device)
        self.nobody = self.live.long(), model.like.new_zeros(num_rows)  # directions and signs of unperturbed rows
        self.no_layout = _kernels().layout_of(0, 0, [-1] * 2 * len(_kernels().MATRICES))
        self.steps: dict[tuple[int, bool], Step] = {}
        self.state: State | None = None  # what the steps belong to

    def forward(self, weights: Weights, arch: Arch, tokens: Tensor, state: State) -> Tensor:
        """Read one token per row, or all tokens with one row (without these kernels), as `model.forward` does.

        Steps are kept for the rows of one state at a time: of another's, nothing is held any longer.
        """
        if state.wkv.shape[1] < len(tokens):
            return forward(weights, arch, tokens, state)
        if self.state is None or any(part.data_ptr() != held.data_ptr() for part, held in zip(state, self.state)):
            self.steps.clear()
            self.state = state
        key = len(tokens), weights.factors is not None
        step = self.steps.get(key) or self._new_step(weights, len(tokens), state)
        if self.capture is not None and step.num_calls == CALLS_BEFORE_CAPTURE:
            step = step._replace(repeat=self.capture(step.run))
        self.steps[key] = step._replace(num_calls=step.num_calls + 1)
        step.rows.tokens.copy_(tokens)
        if weights.direction is not None and weights.sign is not None:
            step.rows.direction.copy_(weights.direction)
            step.rows.sign.copy_(weights.sign)
        (step.repeat or step.run)()
        return step.rows.out.clone()

    def logits(self, weights: Weights, x: Tensor) -> Tensor:
        """Apply the LM head: x (S,C) -> (S,V)."""
        return logits(weights, x)

    def warm_up(self) -> None:
        """Compile the kernels, or load them from Triton's cache: run them on rows that nobody looks at."""
        tokens = torch.zeros(MULTIPLES[0], dtype=torch.int64, device=self.model.like.device)
        self.forward(Weights(self.model.params), self.model.arch, tokens, new_state(self.model, MULTIPLES[0]))
        self.steps.clear()
        self.state = None

    def _new_step(self, weights: Weights, num_rows: int, state: State) -> Step:
        like, is_plain = self.model.like, weights.direction is None
        numbers = torch.zeros(2, num_rows, dtype=torch.int64, device=like.device)  # tokens, directions
        self.live.fill_(1)
        sign, out = like.new_zeros(num_rows), like.new_empty(num_rows, self.model.arch.n_embd)
        weights = weights if is_plain else weights._replace(direction=numbers[1], sign=sign)
        rows = Rows(numbers[0], weights, numbers[1], sign, state, out)
        return Step(rows, partial(self._run, rows), None, 0)

    def _run(self, rows: Rows) -> None:
        rows.out.copy_(self.read_(rows.weights, rows.tokens, rows.state))

    def read_(self, weights: Weights, tokens: Tensor, state: State) -> Tensor:
        """Read one token per row, in place and without a graph: (S,) -> (S,C). Rows that are not `live` stay."""
        kernels, scratch = _kernels(), self._scratch(len(tokens))
        x, mixed = layer_norm(weights, weights.embed(tokens), "blocks.0.ln0"), scratch.work.mixed
        whose = self.nobody if weights.direction is None else (weights.direction, weights.sign)
        own = (*whose, self.live[: len(tokens)], scratch.coefficient, scratch.parts)
        for i, (layer, noise) in enumerate(zip(self.layers, self.noise)):
            layout = noise.layout if weights.direction is not None else self.no_layout
            seen = kernels.LayerNoise(noise.block, noise.scale, *own, layout)
            kernels.norm_and_mix(x, state.att_shift[i], layer.vectors, mixed, seen)
            _time_mix_(x, state.wkv[i], layer, seen, scratch)
            kernels.norm_and_shift(x, state.ffn_shift[i], layer.vectors, mixed[0], seen)
            _channel_mix_(x, layer, seen, scratch)
        return layer_norm(weights, x, "ln_out")

    def _widths(self) -> tuple[int, ...]:
        arch = self.model.arch
        return 6 * arch.n_embd, 7 * arch.n_embd, arch.n_embd, *half_widths(self.model), arch.n_ffn

    def _scratch(self, num_rows: int) -> Scratch:
        """Return buffers for some rows, in the memory that every number of rows shares."""
        if num_rows > self.num_rows:
            raise ValueError(f"the engine was made for {self.num_rows} rows at most; got {num_rows}")
        mixed, products, v_first, *halves, hidden = (m[: num_rows * w] for m, w in zip(self.memory, self._widths()))
        work = _kernels().Work(mixed.view(6, num_rows, -1), products.view(7, num_rows, -1), v_first.view(num_rows, -1))
        views = tuple(half.view(num_rows, -1) for half in halves)
        return Scratch(work, views, hidden.view(num_rows, -1), *(c[:num_rows] for c in self.coefficients))


def _time_mix_(x: Tensor, wkv: Tensor, layer: Layer, noise: Any, scratch: Scratch) -> None:
    """Add a layer's time mix to x (S,C), all but the output matrix's perturbation; wkv (S,H,K_h,K_h) is renewed."""
    kernels, (r, k, v, w, a, g) = _kernels(), scratch.work.mixed
    m = layer.matrices
    for operand, matrix, product in zip((r, k, v), m[:3], scratch.work.products):
        matrix.times_(operand, product)
    for operand, matrix, half in zip((w, a, v, g), m[4:8], scratch.halves):
        if matrix is not None:
            matrix.times_(operand, half)
    kernels.activate_pairs(*scratch.halves, noise)
    for half, matrix, product in zip(scratch.halves, m[8:12], scratch.work.products[3:]):
        if matrix is not None:
            matrix.times_(half, product)
    kernels.update_state(wkv, scratch.work, layer.vectors, layer.is_first, noise)
    m[3].add_(r, x, k)


def _channel_mix_(x: Tensor, layer: Layer, noise: Any, scratch: Scratch) -> None:
    """Add the channel mix to x (S,C)."""
    kernels, (key, value) = _kernels(), layer.matrices[12:]
    key.times_(scratch.work.mixed[0], scratch.hidden)
    kernels.square_relu(scratch.hidden, noise)
    value.add_(scratch.hidden, x, scratch.work.mixed[1])
    kernels.add_ffn_value(x, noise)


def _layer(model: Model, i: int, buffer: Tensor) -> Layer:
    kernels = _kernels()
    *vectors, matrices = layer_params(model.params, i, kernels.MATRICES)
    scales = [model.scales.get(f"blocks.{i}.{name}") for name in kernels.MATRICES]
    scales = [scale if scale is None else scale.to(model.like.dtype) for scale in scales]
    made = (None if m is None else Matrix(m, scale, buffer) for m, scale in zip(matrices, scales))
    return Layer(kernels.LayerVectors(*vectors), tuple(made), i == 0)


def _pack(model: Model, factors: Factors | None, i: int) -> Perturbation:
    """Lay a layer's factors side by side. In bf16 it is then held once: `factors` become views."""
    kernels, device = _kernels(), model.like.device
    packed = pack(factors, i, kernels.MATRICES, _ALIGNED)
    if factors is None or packed.block is None:
        nothing = torch.zeros(1, 1, 1, dtype=torch.bfloat16, device=device)
        return Perturbation(
            nothing, torch.zeros(len(kernels.MATRICES), device=device), kernels.layout_of(1, 1, packed.place)
        )
    if model.like.dtype == torch.bfloat16:
        share_block_(factors, i, kernels.MATRICES, packed)
    layout = kernels.layout_of(packed.block.shape[1], packed.block.shape[2], packed.place)
    return Perturbation(packed.block, torch.tensor(packed.scale, device=device), layout)


@contextmanager
def running(model: Model, factors: Factors | None, num_rows: int) -> Iterator[GpuEngine]:
    """Start the engine for steps of at most so many rows; on a GPU it compiles its kernels and captures graphs."""
    num_rows = max(num_rows, MULTIPLES[0])
    device = model.like.device
    if device.type == "cpu":  # Triton's interpreter: nothing is compiled or captured
        yield GpuEngine(model, factors, num_rows, None)
        return
    with torch.cuda.device(device):  # Triton launches on the current one, wherever the tensors are
        engine = GpuEngine(model, factors, num_rows, partial(_capture, torch.cuda.graph_pool_handle()))
        with announced("rwkv-es: compiling the GPU kernels, once on this machine ..."):
            engine.warm_up()
        yield engine


def _capture(pool: Any, run: Work) -> Work:
    """Record the kernels of a step, which has run before, into a CUDA graph; return what repeats them.

    The graph keeps nothing alive: whoever repeats it must hold `run`, and so the memory. The results of a graph are
    read before another one runs, so that all may share one pool of memory. Not yet measured.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may ask the driver
        run()
    return graph.replay
