"""A row's bits in any company: how many rows a matrix product is given, and whether this machine keeps to it.

Linear algebra libraries choose their code by the number of rows, and different code adds in a different order. MKL can
be made to keep to one (`choose_blas_mode`, before torch is loaded); if that does not help, products are given multiples
of 16, 32 or 64 rows instead of 8, if that makes them agree (`examine`); if nothing helps, a note is printed (`advice`).
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # this module is imported before torch is
    from torch import Tensor

    from rwkv_es.model.forward import Model

MULTIPLES = (8, 16, 32, 64)  # of rows in a product, the least first: with 1, 2 or 5 rows, BLAS takes different paths
_MODE = "MKL_CBWR"
_AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}  # without one of them MKL ignores the mode
_AVX2 = {"avx2", "fma"}
_FEW = 256  # a prompt is read in up to so many rows, whatever the slots
_SAMPLE = 1 << 19  # entries of a large matrix that are tried with all numbers of rows; a few numbers meet the whole


class Product(NamedTuple):
    """A product as an engine makes it."""

    name: str  # of a matrix in it
    width: int  # of its operand
    make: "Callable[[Tensor], Tensor]"  # x (S,width) -> (S,...)
    is_sample: bool = True  # it is cheap enough to be tried with all numbers of rows


class Verdict(NamedTuple):
    """What was found out about the machine's products."""

    multiple: int = MULTIPLES[0]  # of rows, to be given to every product
    by_rows: tuple[str, ...] = ()  # matrices whose products still depend on the number of rows
    by_threads: str = ""  # a matrix whose product depends on the number of threads

    def joined(self, other: "Verdict") -> "Verdict":
        """Return what holds on both of two machines."""
        by_rows = tuple(dict.fromkeys((*self.by_rows, *other.by_rows)))
        return Verdict(max(self.multiple, other.multiple), by_rows, self.by_threads or other.by_threads)


def choose_blas_mode() -> None:
    """Make MKL give a row the same bits among any number of rows, unless the user has set a mode. Costs nothing.

    It is read when torch is loaded: to be called at the start of a program, not by a library.
    """
    if _MODE not in os.environ and "torch" not in sys.modules and (flags := _cpu_flags()):
        best = "AVX512" if flags >= _AVX512 else "AVX2" if flags >= _AVX2 else ""
        if best:
            os.environ[_MODE] = f"{best},STRICT"


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in text.splitlines() if line.startswith("flags")), set())


def padded(num_rows: int, multiple: int) -> int:
    """Round a number of rows up to what matrix products are given."""
    return -(-num_rows // multiple) * multiple


def shares(count: int, num_parts: int, multiple: int, fewest: int = 1) -> list[tuple[int, int]]:
    """Cut `count` rows or words into at most `num_parts` shares in a row, each a multiple and not below `fewest`."""
    size = max(padded(-(-count // num_parts), multiple), min(count, fewest))
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def examine(model: "Model", slots: int, num_threads: int = 1, *, is_fused: bool = False, rank: int = 1) -> Verdict:
    """Find the least multiple of rows for which all products of a model give a row the same bits in any company.

    Every product is made as the engine makes it, with the numbers of rows that `slots` generations lead to. The fused
    engine's threads make products of their own, plain torch's work on one together. rank: of the perturbations.
    """
    from rwkv_es.noise.lowrank import torch_threads

    most = padded(max(slots, _FEW), MULTIPLES[-1])
    products = [*_products(model, is_fused), *_perturbations(model, is_fused, rank)]
    with torch_threads(1 if is_fused else num_threads):
        differing = [(product.name, _counts_that_differ(product, most, model)) for product in products]
    fitting = (m for m in MULTIPLES if not any(count % m == 0 for _, counts in differing for count in counts))
    multiple = next(fitting, 0)
    by_rows = () if multiple else tuple(dict.fromkeys(name for name, counts in differing if counts))
    by_threads = ""
    if num_threads > 1 and model.like.device.type == "cpu":
        multiple = multiple or MULTIPLES[0]
        by_threads = (
            _head_by_shares(model, num_threads, multiple) if is_fused else _by_threads(products, num_threads, model)
        )
    return Verdict(multiple or MULTIPLES[0], by_rows, by_threads)


def agreeing(model: "Model", counts: Sequence[int]) -> list[int]:
    """Return those of some numbers of rows, ascending, whose products give a row the bits of the largest number's."""
    found = list(counts)
    for product in (*_products(model, True), *_perturbations(model, True, 1)) if len(found) > 1 else ():
        x = _operand(found[-1], product.width, model)
        whole = product.make(x)
        found = [count for count in found if _equal(product.make(x[:count]), whole[:count])]
    return found


def advice(verdict: Verdict) -> str:
    """Return a note for the user; "" if there is none."""
    what = []
    if verdict.by_rows:
        what.append(f"how many texts are computed together (seen in {verdict.by_rows[0]})")
    if verdict.by_threads:
        what.append(f"the number of threads (seen in {verdict.by_threads})")
    if not what:
        return ""
    return (
        f"note: on this machine the last bits of a matrix product depend on {' and '.join(what)}. This is harmless: "
        "training works as well; but results repeat bit for bit only with the same --slots, --threads and number of "
        "processes"
    )


def say_advice(verdict: Verdict) -> None:
    """Say on stderr what this machine cannot promise."""
    if text := advice(verdict):
        print(f"rwkv-es: {text}", file=sys.stderr)


def _counts_that_differ(product: Product, most: int, model: "Model") -> set[int]:
    """Return the numbers of rows for which the bits of a row depend on it, or on its place."""
    x = _operand(most, product.width, model)
    whole = product.make(x)
    counts = list(_counts(most)) if product.is_sample else list(MULTIPLES)
    found = {count for count in counts if not _equal(product.make(x[:count]), whole[:count])}
    return found if _equal(product.make(x.flip(0)), whole.flip(0)) else {*counts, MULTIPLES[-1]}


def _counts(most: int) -> Iterator[int]:
    """Yield the numbers of rows to try: all multiples of 8 up to 128, some up to 256, every eighth part of `most`."""
    yield from range(MULTIPLES[0], _FEW // 2 + 1, MULTIPLES[0])
    yield from (152, 192, 216, 248, _FEW)
    eighth = padded(most // 8, MULTIPLES[0])
    yield from range(padded(_FEW + 1, eighth), most, eighth)


def _operand(rows: int, width: int, model: "Model") -> "Tensor":
    """Return some numbers (rows,width)."""
    import torch

    like = model.like
    x = torch.linspace(-1, 1, rows * width, device=like.device).mul_(1000).sin_()
    return x.to(like.dtype).reshape(rows, width)


def _equal(one: "Tensor", other: "Tensor") -> bool:
    import torch

    return torch.equal(one, other)


def _products(model: "Model", is_fused: bool) -> Iterator[Product]:
    """Yield each kind of product with a matrix of the model; of a large one a part of its outputs, and the whole."""
    for name in _shapes(model):
        matrix, scale = model.params[name], model.scales.get(name)
        if not name.endswith(".weight"):  # a low-rank parameter, used as x @ w
            yield Product(name, matrix.shape[0], partial(_times, matrix))
            continue
        width = matrix.shape[1]
        most = max(MULTIPLES[-1], _SAMPLE // width // 8 * 8)
        for part in {min(len(matrix), most), len(matrix)}:
            rows, is_sample = slice(part), part <= most
            held = matrix[rows], None if scale is None else scale[rows]
            make = partial(_linear, held, name == "head.weight", model.is_fp8)
            yield Product(name, width, make, is_sample)
            if is_fused and len(matrix) == model.arch.n_embd:  # what is added to the residual
                yield Product(name, width, partial(_added, matrix[rows].t()), is_sample)


def _shapes(model: "Model") -> list[str]:
    """Return the name of one matrix of each shape and use."""
    found: dict[tuple[object, ...], str] = {}
    for name, matrix in model.params.items():
        if matrix.dim() == 2 and not name.endswith("r_k") and name != "emb.weight":
            found.setdefault((tuple(matrix.shape), name.endswith(".weight"), matrix.dtype), name)
    return list(found.values())


def _perturbations(model: "Model", is_fused: bool, rank: int) -> Iterator[Product]:
    """Yield the product of each row with its own perturbation; the fused engine leaves only the head's to torch."""
    from rwkv_es.noise.lowrank import low_rank

    def make(name: str, x: "Tensor") -> "Tensor":
        num_out, num_in = model.params[name].shape if name.endswith(".weight") else model.params[name].shape[::-1]
        a, b = (_operand(2 * size, rank, model).view(2, size, rank) for size in (num_out, num_in))
        index = (x[:, 0] > 0).long()
        return low_rank(x, a, b, index, 1 - 2 * index.to(x.dtype))

    for name in ("head.weight",) if is_fused else _shapes(model):
        yield Product(name, model.params[name].shape[1 if name.endswith(".weight") else 0], partial(make, name))


def _linear(held: "tuple[Tensor, Tensor | None]", is_head: bool, is_fp8: bool, x: "Tensor") -> "Tensor":
    from rwkv_es.model.weights import precise_product, product

    return precise_product(x, *held) if is_head else product(x, *held, is_fp8)


def _times(matrix: "Tensor", x: "Tensor") -> "Tensor":
    return x @ matrix


def _added(matrix: "Tensor", x: "Tensor") -> "Tensor":
    """Add a product to what is there, as the CPU engine does with the residual."""
    import torch

    return torch.addmm(x.new_ones(len(x), matrix.shape[1]), x, matrix)


def _by_threads(products: list[Product], num_threads: int, model: "Model") -> str:
    """Return the name of a matrix whose product has different bits with one thread; "" if there is none."""
    from rwkv_es.noise.lowrank import torch_threads

    for product in products:
        x = _operand(MULTIPLES[-1], product.width, model)
        found = []
        for count in (num_threads, 1):
            with torch_threads(count):
                found.append(product.make(x))
        if not _equal(*found):
            return product.name
    return ""


def _head_by_shares(model: "Model", num_threads: int, multiple: int) -> str:
    """Return the head's name if its product has different bits where threads share its words out; else ""."""
    import torch

    name, head = "head.weight", model.params["head.weight"]
    x = _operand(MULTIPLES[-1], head.shape[1], model)
    whole, found = torch.mm(x, head.t()), x.new_empty(len(x), len(head))
    for start, stop in shares(len(head), num_threads, multiple):
        torch.mm(x, head[start:stop].t(), out=found[:, start:stop])
    return "" if _equal(found, whole) else name
