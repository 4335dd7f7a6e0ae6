"""A stand-in linear algebra library: sums in an order that depends on the number of rows by a rule."""

import torch
from torch.nn import functional


def install(monkeypatch, is_odd):
    mm, mul, linear = torch.mm, torch.Tensor.__matmul__, functional.linear

    def changed(y, rows):  # one unit in the last place more or less, as another order of adding gives
        return torch.nextafter(y, torch.full_like(y, torch.inf)) if is_odd(rows) else y

    def new_mm(x, w, out=None):
        found = changed(mm(x, w), len(x))
        return found if out is None else out.copy_(found)

    monkeypatch.setattr(torch, "mm", new_mm)
    monkeypatch.setattr(torch, "addmm", lambda y, x, w, out=None: into(out, y + changed(mm(x, w), len(x))))
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, w: changed(mul(x, w), len(x)))
    monkeypatch.setattr(functional, "linear", lambda x, w: changed(linear(x, w), len(x)))


def into(out, values):
    return values if out is None else out.copy_(values)
