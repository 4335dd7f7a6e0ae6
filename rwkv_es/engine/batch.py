"""A row's bits in any company: how many rows a matrix product is given, and whether this machine keeps to it.

Linear algebra libraries choose their code by the number of rows, and different code adds in a different order. MKL can
be made to keep to one (`choose_blas_mode`, before torch is loaded); if that does not help, products are given multiples
of 16, 32 or 64 rows instead of 8, if that makes them agree (`examine`); if nothing helps, a note is printed (`advice`).
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # this module is imported before torch is
    from torch import Tensor

    from rwkv_es.model.forward import Model

MULTIPLES = (8, 16, 32, 64)  # of rows in a product, the least first: with 1, 2 or 5 rows, BLAS takes different paths
_MODE = "MKL_CBWR"
_FEW = 256  # up to here all numbers of rows are tried
_SAMPLE = 1 << 20  # entries of a large matrix that are tried with all numbers of rows; a few numbers meet the whole
_DIRECTIONS = 256  # in the sum of an update that is tried with several threads


class Verdict(NamedTuple):
    """What was found out about the machine's products."""

    multiple: int = MULTIPLES[0]  # of rows, to be given to every product
    by_rows: tuple[str, ...] = ()  # matrices whose products still depend on the number of rows
    by_threads: bool = False  # sums depend on the number of threads

    def joined(self, other: "Verdict") -> "Verdict":
        """Return what holds on both of two machines."""
        by_rows = tuple(dict.fromkeys((*self.by_rows, *other.by_rows)))
        return Verdict(max(self.multiple, other.multiple), by_rows, self.by_threads or other.by_threads)


def choose_blas_mode() -> None:
    """Make MKL give a row the same bits among any number of rows, unless the user has set a mode. Costs nothing.

    It is read when torch is loaded: to be called at the start of a program, not by a library.
    """
    if _MODE not in os.environ and "torch" not in sys.modules and (flags := _cpu_flags()):
        best = "AVX512" if "avx512f" in flags else "AVX2" if "avx2" in flags else ""
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


def examine(model: "Model", slots: int, num_threads: int = 1, product_threads: int = 1) -> Verdict:
    """Find the least multiple of rows for which all products of a model give a row the same bits in any company.

    Every product is made as the engines make it, by `product_threads` threads, with the numbers of rows that `slots`
    generations lead to; `num_threads` make the update.
    """
    most = padded(max(slots, _FEW), MULTIPLES[-1])
    products = list(_products(model))
    with _threads(product_threads):
        differing = [(name, _counts_that_differ(make, width, most, model)) for name, width, make in products]
        wholes = [make(_operand(most, width, model)) for _, width, make in products if product_threads > 1]
    with _threads(1):
        alone = [make(_operand(most, width, model)) for _, width, make in products if product_threads > 1]
    by_threads = _update_differs(num_threads) or not all(map(_equal, wholes, alone))
    for multiple in MULTIPLES:
        if not any(count % multiple == 0 for _, counts in differing for count in counts):
            return Verdict(multiple, (), by_threads)
    return Verdict(MULTIPLES[0], tuple(dict.fromkeys(name for name, counts in differing if counts)), by_threads)


def advice(verdict: Verdict) -> str:
    """Return a note for the user; "" if there is none."""
    what = []
    if verdict.by_rows:
        what.append(f"how many rows are computed together (seen in {verdict.by_rows[0]})")
    if verdict.by_threads:
        what.append("the number of threads")
    if not what:
        return ""
    return (
        f"note: on this machine the last bits of a matrix product depend on {' and '.join(what)}. This is harmless: "
        "training works as well; but results repeat bit for bit only with the same --slots, --threads and number of "
        "processes"
    )


def _counts_that_differ(make: "Callable[[Tensor], Tensor]", width: int, most: int, model: "Model") -> set[int]:
    """Return the numbers of rows for which the bits of a row depend on it, or on its place."""
    x = _operand(most, width, model)
    whole = make(x)
    found = {count for count in _counts(most) if not _equal(make(x[:count]), whole[:count])}
    return found if _equal(make(x.flip(0)), whole.flip(0)) else set(_counts(most))


def _operand(rows: int, width: int, model: "Model") -> "Tensor":
    """Return some numbers (rows,width)."""
    import torch

    like = model.like
    x = torch.linspace(-1, 1, rows * width, device=like.device).mul_(1000).sin_()
    return x.to(like.dtype).reshape(rows, width)


def _equal(one: "Tensor", other: "Tensor") -> bool:
    import torch

    return torch.equal(one, other)


def _counts(most: int) -> Iterator[int]:
    """Yield the numbers of rows to try: all multiples of 8 up to 256, then every eighth part of `most`."""
    yield from range(MULTIPLES[0], min(_FEW, most) + 1, MULTIPLES[0])
    eighth = padded(most // 8, MULTIPLES[0])
    yield from range(padded(_FEW + 1, eighth), most, eighth)


def _products(model: "Model") -> "Iterator[tuple[str, int, Callable[[Tensor], Tensor]]]":
    """Yield each kind of product with the name of a matrix, the width of its operand, and what makes it."""
    shapes: dict[tuple[object, ...], str] = {}
    for name, matrix in model.params.items():
        if matrix.dim() == 2 and not name.endswith("r_k") and name != "emb.weight":
            shapes.setdefault((tuple(matrix.shape), name.endswith(".weight"), matrix.dtype), name)
    for name in shapes.values():
        yield from _products_of(model, name)


def _products_of(model: "Model", name: str) -> "Iterator[tuple[str, int, Callable[[Tensor], Tensor]]]":
    from rwkv_es.model.weights import precise_product, product

    matrix, scale = model.params[name], model.scales.get(name)
    if not name.endswith(".weight"):  # a low-rank parameter, used as x @ w
        yield name, matrix.shape[0], partial(_times, matrix)
        return
    width = matrix.shape[1]
    part = slice(max(MULTIPLES[0], _SAMPLE // width // 8 * 8))
    made = precise_product if name == "head.weight" else product
    yield name, width, partial(made, weight=matrix[part], scale=None if scale is None else scale[part])
    if scale is None and model.like.device.type == "cpu":
        yield name, width, partial(_added, matrix[part].t())
    if name == "head.weight" and scale is None:
        yield name, width, partial(_in_halves, matrix[part])


def _times(matrix: "Tensor", x: "Tensor") -> "Tensor":
    return x @ matrix


def _added(matrix: "Tensor", x: "Tensor") -> "Tensor":
    """Add a product to what is there, as the CPU engine does with the residual."""
    import torch

    return torch.addmm(x.new_ones(len(x), matrix.shape[1]), x, matrix)


def _in_halves(head: "Tensor", x: "Tensor") -> "Tensor":
    """Return the head's product for few rows as a whole, for more in two halves of its words, as threads share them."""
    import torch

    middle = len(head) // 2 // 8 * 8
    if len(x) <= MULTIPLES[-1] or not middle:
        return torch.mm(x, head.t())
    return torch.cat([torch.mm(x, part.t()) for part in (head[:middle], head[middle:])], 1)


def _update_differs(num_threads: int) -> bool:
    """Say whether the sum over a population, as the update makes it, has different bits with one thread."""
    import torch

    from rwkv_es.noise.lowrank import weighted_sum

    if num_threads == 1:
        return False
    a = torch.linspace(-1, 1, _DIRECTIONS * 256).mul_(1000).sin_().reshape(_DIRECTIONS, 256, 1)
    sums = []
    for threads in (num_threads, 1):
        with _threads(threads):
            sums.append([weighted_sum(a.repeat(k, 1, 1), a.repeat(k, 1, 1), torch.ones(k * len(a))) for k in (1, 8)])
    return not all(map(_equal, *sums))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
