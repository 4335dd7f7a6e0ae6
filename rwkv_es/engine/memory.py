"""What a process of a training run holds, in closed form: arithmetic over sizes, before anything is loaded.

Constants named `_MEASURED` come from `scripts/memory_step.py`; the rest follows from what the engines allocate.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from rwkv_es.engine.batch import MULTIPLES, padded
from rwkv_es.model.layout import HEAD_SIZE, Arch, expected_shapes
from rwkv_es.noise.targets import Target, select

ROWS_AT_ONCE = MULTIPLES[0]  # slots come in multiples of this
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2}  # fp32 numbers that an optimiser remembers per weight
_FUSED = ("numba", "triton")  # engines that keep the factors a second time, side by side in bf16
_ROWS_PER_BLOCK = 256  # of the CPU kernels
_SLAB = 1 << 22  # entries of a matrix that are updated at once, and noise values drawn at once
_FEWEST_DIRECTIONS = 64  # drawn at once
_SLABS_MEASURED, _CHUNKS_MEASURED = 5, 4  # held at once while a matrix is updated
_VECTORS = 19  # of length C that a fused engine copies, per layer
_PROGRAM_MEASURED = 195_000_000  # Python, torch and the World vocabulary
_ENGINE_MEASURED = {"numba": 32_000_000, "torch": 25_000_000, "triton": 0}  # compiled kernels; the products' buffers
_DEVICE_PROGRAM = 2_000_000_000  # of a GPU: the context, the libraries' workspaces, what fragments
_TORCH_ROW = 80  # numbers of length C that plain torch holds at once for a row of a layer


class Load(NamedTuple):
    """What is asked of one process, as far as its memory depends on it; names as in `config.options.Config`."""

    slots: int  # generations in flight here
    population: int  # of all processes
    processes: int = 1
    dtype: str = "fp32"  # of the engine
    quantize: str = "none"
    state_dtype: str = "fp32"
    master: str = "fp32"
    optimizer: str = "sgd"
    engine: str = "numba"
    threads: int = 1
    temperature: float = 0.0
    is_cut: bool = False  # by top_p or top_k
    saved_per_slot: int = 0  # states of prefixes that several requests share
    device: str = "cpu"  # or "cuda"


class Memory(NamedTuple):
    """Bytes of one process, by what they are for. On a GPU all but `host` are on the device."""

    program: int
    weights: int
    masters: int  # fp32 copies of bf16 weights, where the device holds them
    optimizer: int
    factors: int
    states: int
    saved: int  # states of shared prefixes
    packed: int  # the factors as the fused kernels read them
    scratch: int  # between the products of a layer
    logits: int  # and what sampling makes of them
    update: int  # while the weights are moved and compared; the states are gone by then
    host: int  # in the host's memory, where the device is another

    @property
    def lasting(self) -> int:
        """What is held all the time."""
        return self.program + self.weights + self.masters + self.optimizer + self.factors

    @property
    def generating(self) -> int:
        """What is held besides while answers are generated."""
        return self.states + self.saved + self.packed + self.scratch + self.logits

    @property
    def peak(self) -> int:
        """The most that is held on the device at any time."""
        return self.lasting + max(self.generating, self.update)


def targets_of(arch: Arch, targets: Mapping[str, float], rank: int) -> dict[str, Target]:
    """Return the tensors that are perturbed in a model of these sizes, by the option `targets`.

    Raises:
        ConfigError: a name that matches no tensor.
    """
    shapes = expected_shapes(arch)
    if any("state" in name for name in targets):
        heads = (arch.n_head, arch.head_size, arch.head_size)
        shapes.update({f"blocks.{i}.att.time_state": heads for i in range(arch.n_layer)})
    return select(shapes, targets, rank)


def needed(arch: Arch, targets: Mapping[str, Target], load: Load) -> Memory:
    """Return what a process holds for a model of these sizes; `targets` are those of `targets_of`."""
    shapes = dict(expected_shapes(arch))
    shapes.update({name: (*t.batch, t.p, t.q) for name, t in targets.items() if name not in shapes})  # initial states
    entries = {name: math.prod(shapes[name]) for name in targets}
    width, is_cpu = _BYTES[load.dtype], load.device == "cpu"
    mastered = [name for name in targets if load.master == "fp32" and width == 2 and not _is_int8(load, name, shapes)]
    masters = 4 * sum(entries[name] for name in mastered)
    copied = [n for n in shapes if masters and n not in mastered and not _is_int8(load, n, shapes)]  # to compare them
    copies = 4 * sum(math.prod(shapes[name]) for name in copied)
    update = _update(list(targets.values()), entries, load)
    rows = padded(load.slots, ROWS_AT_ONCE)
    state = arch.n_layer * arch.n_embd * (HEAD_SIZE * _BYTES[load.state_dtype] + 2 * width)
    pairs = -(-load.population // (2 * load.processes))
    return Memory(
        program=_PROGRAM_MEASURED + _ENGINE_MEASURED[load.engine] if is_cpu else _DEVICE_PROGRAM,
        weights=sum(_stored(name, shape, load) for name, shape in shapes.items()),
        masters=masters if is_cpu else 0,
        optimizer=4 * _MOMENTS[load.optimizer] * sum(entries.values()),
        factors=pairs * width * sum(target.num_values for target in targets.values()),
        states=rows * state,
        saved=load.saved_per_slot * load.slots * state,
        packed=2 * pairs * _packed_values(targets) if load.engine in _FUSED else 0,
        scratch=_scratch(arch, load, rows),
        logits=rows * arch.n_vocab * _bytes_per_logit(load),
        update=max(update, copies) if is_cpu else update,
        host=0 if is_cpu else _PROGRAM_MEASURED + masters + copies,
    )


def most_slots(
    free: int, arch: Arch, targets: Mapping[str, Target], load: Load, rows_per_member: int = 0
) -> tuple[int, Memory]:
    """Return the most generations in flight for which a process needs no more than `free` bytes; 0: none.

    Also what they need. `load.slots` is not looked at. With `rows_per_member` the population grows with the slots: as
    many members as fill them.
    """

    def memory(blocks: int) -> Memory:
        slots = blocks * ROWS_AT_ONCE
        members = 2 * -(-slots // (2 * rows_per_member)) * load.processes if rows_per_member else load.population
        return needed(arch, targets, load._replace(slots=slots, population=members))

    low, high = 0, 1
    while memory(high).peak <= free and high < _SLAB:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory(middle).peak <= free else (low, middle)
    return low * ROWS_AT_ONCE, memory(max(low, 1))


def _is_int8(load: Load, name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return load.quantize == "int8" and len(shapes[name]) == 2 and name.endswith(".weight")


def _stored(name: str, shape: tuple[int, ...], load: Load) -> int:
    if _is_int8(load, name, {name: shape}):
        return math.prod(shape) + 4 * shape[0]  # and a scale per row
    return math.prod(shape) * _BYTES[load.dtype]


def _packed_values(targets: Mapping[str, Target]) -> int:
    """Count the values per direction of the matrices that the fused kernels perturb themselves."""
    return sum(t.num_values for name, t in targets.items() if name.startswith("blocks.") and not (t.is_full or t.batch))


def _scratch(arch: Arch, load: Load, rows: int) -> int:
    """Count a layer's operands and products for the rows that go through it together."""
    pairs = arch.rank_w + arch.rank_a + arch.rank_v + arch.rank_g
    row, vectors = 14 * arch.n_embd + arch.n_ffn + pairs, _VECTORS * arch.n_layer * arch.n_embd
    if load.engine == "numba":
        return 4 * (load.threads * min(_ROWS_PER_BLOCK, padded(-(-rows // load.threads), ROWS_AT_ONCE)) * row + vectors)
    if load.engine == "triton":
        return _BYTES[load.dtype] * (rows * (row + 2 * arch.n_embd) + vectors)
    return rows * _TORCH_ROW * arch.n_embd * _BYTES[load.dtype]


def _bytes_per_logit(load: Load) -> int:
    """Logits in fp32, before that in the engine's dtype; sampling works in double precision."""
    own = 0 if load.dtype == "fp32" else _BYTES[load.dtype]
    sampling = 0 if not load.temperature else 56 if load.is_cut else 33
    return 4 + own + sampling


def _update(targets: list[Target], entries: Mapping[str, int], load: Load) -> int:
    """Count a slab of the largest target a few times over, and the noise drawn for it."""
    largest = max(entries.values())
    slab = largest if load.optimizer != "sgd" else min(largest, _SLAB)
    pairs = load.population // 2
    drawn = max(min(pairs, max(_SLAB // t.num_values, _FEWEST_DIRECTIONS)) * t.num_values for t in targets)
    return 4 * (_SLABS_MEASURED * slab + _CHUNKS_MEASURED * drawn)
