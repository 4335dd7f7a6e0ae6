"""What a process of a training run holds, in closed form: arithmetic over sizes, before anything is loaded.

Constants named `_MEASURED` come from `scripts/memory_step.py`; the rest follows from what the engines allocate.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from rwkv_es.model.batch import MULTIPLES, padded
from rwkv_es.model.layout import HEAD_SIZE, Arch, expected_shapes
from rwkv_es.noise.targets import Target, select

ROWS_AT_ONCE = MULTIPLES[0]  # slots come in multiples of this
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2}  # fp32 numbers that an optimiser remembers per weight
_FUSED = ("numba", "triton")  # engines that keep the factors a second time, side by side in bf16
DEFAULT_SLOTS = 256  # on a CPU: measured as enough for its products
SLOTS_AT_ONCE = 64  # on a GPU, where they are chosen: tiles of a product
_FEWEST_SAVED = 16
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
    has_turns: bool = False  # episodes wait for replies, each with its state
    has_references: bool = False  # whose likelihood is computed in double precision
    device: str = "cpu"  # or "cuda"
    card: int = 0  # bytes of the GPU; 0: plenty


class Memory(NamedTuple):
    """Bytes of one process, by what they are for. On a GPU all but `host` are on the device."""

    program: int
    weights: int
    masters: int  # fp32 copies of bf16 weights; on a GPU the 16 bits that the weights lack
    optimizer: int
    factors: int
    states: int
    saved: int  # states of shared prefixes, and of episodes that wait
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


class _Sums(NamedTuple):
    """What does not depend on the numbers of slots and members."""

    weights: int  # bytes
    masters: int  # bytes
    copies: int  # bytes: whoever compares the masters or saves them makes all other tensors fp32 too
    entries: int  # of all targets
    largest: int  # entries of the largest target
    values: int  # noise values of a direction
    packed: int  # those of what the fused kernels perturb themselves
    sizes: frozenset[int]  # the numbers of noise values that a target's direction has


def needed(arch: Arch, targets: Mapping[str, Target], load: Load) -> Memory:
    """Return what a process holds for a model of these sizes; `targets` are those of `targets_of`."""
    return _memory(arch, load, _sums(arch, targets, load))


def _sums(arch: Arch, targets: Mapping[str, Target], load: Load) -> _Sums:
    shapes = dict(expected_shapes(arch))
    shapes.update({name: (*t.batch, t.p, t.q) for name, t in targets.items() if name not in shapes})  # initial states
    in_8_bits = {name for name, shape in shapes.items() if is_int8(load, name, shape)}
    has_masters, has_vectors = load.master == "fp32" and BYTES[load.dtype] == 2, load.engine == "numba"
    mastered = targets.keys() - in_8_bits if has_masters else set()
    others = shapes.keys() - mastered - in_8_bits if mastered else set()
    entries = {name: math.prod(shape) for name, shape in shapes.items()}
    in_block = [t for n, t in targets.items() if n.startswith("blocks.") and not t.batch and t.is_full <= has_vectors]
    return _Sums(
        weights=sum(
            n + 4 * shapes[name][0] if name in in_8_bits else n * BYTES[load.dtype] for name, n in entries.items()
        ),
        masters=4 * sum(entries[name] for name in mastered),
        copies=4 * sum(entries[name] for name in others),
        entries=sum(entries[name] for name in targets),
        largest=max(entries[name] for name in targets),
        values=sum(target.num_values for target in targets.values()),
        packed=sum(target.num_values for target in in_block),
        sizes=frozenset(target.num_values for target in targets.values()),
    )


def _memory(arch: Arch, load: Load, sums: _Sums) -> Memory:
    rows, state, is_cpu = padded(load.slots, ROWS_AT_ONCE), state_bytes(arch, load), load.device == "cpu"
    pairs = -(-load.population // (2 * load.processes))
    update, num_saved = _update(load, sums), min(load.saved_per_slot * load.slots, most_saved(load.slots))
    has_room = not load.card or masters_have_room(sums.masters // 2, load.card - _DEVICE_PROGRAM - sums.weights)
    return Memory(
        program=_PROGRAM_MEASURED + _ENGINE_MEASURED[load.engine] if is_cpu else _DEVICE_PROGRAM,
        weights=sums.weights,
        masters=sums.masters if is_cpu else sums.masters // 2 if has_room else 0,
        optimizer=4 * MOMENTS[load.optimizer] * sums.entries,
        factors=pairs * BYTES[load.dtype] * sums.values,
        states=rows * state,
        saved=(num_saved + load.has_turns * most_under_way(load.slots)) * state,
        packed=0 if _is_held_once(load) else 2 * pairs * sums.packed,
        scratch=_scratch(arch, load, rows),
        logits=rows * arch.n_vocab * _bytes_per_logit(load),
        update=max(update, sums.copies) if is_cpu else update,
        host=0 if is_cpu else _PROGRAM_MEASURED + sums.masters + sums.copies,  # while a snapshot is made
    )


def most_slots(
    free: int, arch: Arch, targets: Mapping[str, Target], load: Load, rows_per_member: int = 0
) -> tuple[int, Memory]:
    """Return the most generations in flight for which a process needs no more than `free` bytes; 0: none.

    Also what they need. `load.slots` is not looked at. With `rows_per_member` the population grows with the slots: as
    many members as fill them.
    """

    sums = _sums(arch, targets, load)

    def memory(blocks: int) -> Memory:
        slots = blocks * ROWS_AT_ONCE
        members = 2 * -(-slots // (2 * rows_per_member)) * load.processes if rows_per_member else load.population
        return _memory(arch, load._replace(slots=slots, population=members), sums)

    low, high = 0, 1
    while memory(high).peak <= free and high < _SLAB:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory(middle).peak <= free else (low, middle)
    return low * ROWS_AT_ONCE, memory(max(low, 1))


def masters_have_room(parts: int, free: int) -> bool:
    """Say whether a GPU with so much left beside the weights holds the masters' parts; else they are on the host."""
    return 3 * parts <= free


def _is_held_once(load: Load) -> bool:
    """Say whether there is no second copy of the factors, side by side in bf16 as the fused kernels read them."""
    return load.engine not in _FUSED or (load.engine == "triton" and load.dtype == "bf16")


def state_bytes(arch: Arch, load: Load) -> int:
    """Return what a row's recurrent state takes, with the last token's activations that it keeps."""
    return arch.n_layer * arch.n_embd * (HEAD_SIZE * BYTES[load.state_dtype] + 2 * BYTES[load.dtype])


def most_saved(slots: int) -> int:
    """Return how many states of shared prefixes are saved at a time: a quarter of the slots, and no fewer than 16."""
    return max(slots // 4, _FEWEST_SAVED)


def most_under_way(slots: int) -> int:
    """Return how many episodes are in slots or wait for a reply at a time, each with its state: twice the slots."""
    return 2 * slots


def is_int8(load: Load, name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a tensor is held in 8 bits."""
    return load.quantize == "int8" and len(shape) == 2 and name.endswith(".weight")


def _scratch(arch: Arch, load: Load, rows: int) -> int:
    """Count a layer's operands and products for the rows that go through it together."""
    pairs = arch.rank_w + arch.rank_a + arch.rank_v + arch.rank_g
    row, vectors = 14 * arch.n_embd + arch.n_ffn + pairs, _VECTORS * arch.n_layer * arch.n_embd
    if load.engine == "numba":
        return 4 * (load.threads * min(_ROWS_PER_BLOCK, padded(-(-rows // load.threads), ROWS_AT_ONCE)) * row + vectors)
    if load.engine == "triton":
        turned = {"int8": arch.n_embd * arch.n_ffn, "fp8": arch.n_layer * arch.n_embd * (2 * arch.n_embd + arch.n_ffn)}
        row += 3 * arch.n_embd  # int8: a matrix at a time in bf16; fp8: a copy of all in one byte
        return BYTES[load.dtype] * (rows * row + vectors + turned.get(load.quantize, 0))
    return rows * _TORCH_ROW * arch.n_embd * BYTES[load.dtype]


def _bytes_per_logit(load: Load) -> int:
    """Logits in fp32; sampling works in double precision, but for a kernel that keeps nothing, and so does reading."""
    is_in_place = not load.temperature or (load.engine == "triton" and not load.is_cut)
    return 4 + max(0 if is_in_place else 56 if load.is_cut else 33, 16 * load.has_references)


def _update(load: Load, sums: _Sums) -> int:
    """Count a slab of the largest target a few times over, and the noise drawn for it."""
    slab = sums.largest if load.optimizer != "sgd" else min(sums.largest, _SLAB)
    drawn = max(min(load.population // 2, max(_SLAB // size, _FEWEST_DIRECTIONS)) * size for size in sums.sizes)
    return 4 * (_SLABS_MEASURED * slab + _CHUNKS_MEASURED * drawn)
