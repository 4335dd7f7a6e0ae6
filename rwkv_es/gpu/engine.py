"""The GPU engine: `model.forward` by Triton kernels around plain matrix products, repeated as CUDA graphs.

A step reads and writes at fixed addresses only and waits for nothing, so that it can be captured. The kernels are
proved value by value in Triton's interpreter; the speed of this engine has not been measured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.gpu import layer as layers
from rwkv_es.gpu.layer import Scratch, kernels
from rwkv_es.gpu.operands import LayerNoise, Reading, layout_of
from rwkv_es.gpu.operands import Work as LayerWork
from rwkv_es.model.batch import MULTIPLES
from rwkv_es.model.forward import Model, State, forward, layer_norm, logits, new_state
from rwkv_es.model.layers import MATRICES, announced, are_covered, half_widths
from rwkv_es.model.layout import Arch
from rwkv_es.model.weights import Factors, Weights

CALLS_BEFORE_CAPTURE = 16  # of one number of rows: a graph pays only if it is repeated

Work = Callable[[], None]


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


def is_able(model: Model, factors: Factors | None) -> bool:
    """Say whether this engine can run a model under these perturbations."""
    like = model.like
    if like.dtype not in (torch.float32, torch.bfloat16) or like.device.type not in ("cuda", "cpu"):
        return False
    if kernels() is None or (like.device.type == "cpu" and not kernels().IS_INTERPRETED):
        return False
    return are_covered(factors, MATRICES)


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
        self.layers = [layers.made(model, i, buffer) for i in range(model.arch.n_layer)]
        self.noise = [layers.packed(model, factors, i) for i in range(model.arch.n_layer)]
        self.memory = [
            model.like.new_zeros(num_rows * width) for width in self._widths()
        ]  # idle rows are multiplied, too
        rank = max(noise.block.shape[1] for noise in self.noise)
        shapes = (len(MATRICES), rank), (kernels().parts_of(model.arch.n_ffn), rank)
        self.coefficients = [torch.zeros(num_rows, *shape, device=model.like.device) for shape in shapes]
        self.live = torch.ones(num_rows, dtype=torch.int32, device=model.like.device)
        self.nobody = self.live.long(), model.like.new_zeros(num_rows)  # directions and signs of unperturbed rows
        self.no_layout = layout_of(0, 0, [-1] * 2 * len(MATRICES))
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
        scratch = self._scratch(len(tokens))
        x = layer_norm(weights, weights.embed(tokens), "blocks.0.ln0")
        for i, layer in enumerate(self.layers):
            noise = self._noise(i, weights, self.live[: len(tokens)], scratch)
            layers.read_token_(x, State(*(part[i] for part in state)), layer, noise, scratch)
        return layer_norm(weights, x, "ln_out")

    def read_texts_(self, weights: Weights, reading: Reading, state: State) -> None:
        """Read several tokens of each of some rows, into the states of their slots.

        The weights are as the tokens see them; the state is that of all slots. No logits: a prompt's last token is read
        by a tick.
        """
        scratch = self._scratch(len(reading.tokens))
        x = layer_norm(weights, weights.embed(reading.tokens), "blocks.0.ln0")
        two = x, torch.empty_like(x)
        for i, layer in enumerate(self.layers):
            read = reading.texts, self._noise(i, weights, reading.live, scratch)
            layers.read_texts_(two, State(*(part[i] for part in state)), layer, read, scratch)
            two = two[::-1]

    def _noise(self, i: int, weights: Weights, live: Tensor, scratch: Scratch) -> LayerNoise:
        """Return layer i's noise as some rows see it."""
        made, layout, (direction, sign) = self.noise[i], self.no_layout, (part[: len(live)] for part in self.nobody)
        if weights.direction is not None and weights.sign is not None:
            layout, direction, sign = made.layout, weights.direction, weights.sign
        return LayerNoise(made.block, made.scale, direction, sign, live, scratch.coefficient, scratch.parts, layout)

    def _widths(self) -> tuple[int, ...]:
        arch = self.model.arch
        return 6 * arch.n_embd, 7 * arch.n_embd, arch.n_embd, *half_widths(self.model), arch.n_ffn

    def _scratch(self, num_rows: int) -> Scratch:
        """Return buffers for some rows, in the memory that every number of rows shares."""
        if num_rows > self.num_rows:
            raise ValueError(f"the engine was made for {self.num_rows} rows at most; got {num_rows}")
        mixed, products, v_first, *halves, hidden = (m[: num_rows * w] for m, w in zip(self.memory, self._widths()))
        work = LayerWork(mixed.view(6, num_rows, -1), products.view(7, num_rows, -1), v_first.view(num_rows, -1))
        views = tuple(half.view(num_rows, -1) for half in halves)
        return Scratch(work, views, hidden.view(num_rows, -1), *(c[:num_rows] for c in self.coefficients))


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
