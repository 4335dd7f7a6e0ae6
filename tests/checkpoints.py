"""Random RWKV-7 models in the official layout, for tests: every parameter differs from its neutral value."""

import torch
from torch import Tensor

RANKS = (16, 24, 8, 32)  # w, a, v, g: all different, so that a mix-up shows in a shape
HEAD_SIZE = 64

# tensor of a block -> (centre, spread), for the vectors; low-rank pairs and matrices are scaled by their fan-in
VECTORS = {
    "x_r": (0.5, 0.25),
    "x_w": (0.5, 0.25),
    "x_k": (0.5, 0.25),
    "x_v": (0.5, 0.25),
    "x_a": (0.5, 0.25),
    "x_g": (0.5, 0.25),
    "w0": (-1.0, 1.5),
    "a0": (0.0, 1.0),
    "v0": (0.0, 1.0),
    "k_k": (0.85, 0.2),
    "k_a": (1.0, 0.2),
}


def block_shapes(layer: int, n_embd: int, ranks: tuple[int, int, int, int] = RANKS) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one block's tensors, in the order of the official trainer's state dict."""
    c, (w, a, v, g) = n_embd, ranks
    norms = ("ln1", "ln2", "ln0") if layer == 0 else ("ln1", "ln2")
    shapes: dict[str, tuple[int, ...]] = {f"{ln}.{part}": (c,) for ln in norms for part in ("weight", "bias")}
    shapes |= {f"att.x_{name}": (1, 1, c) for name in "rwkvag"}
    for name, rank in (("w", w), ("a", a), ("v", v)):
        shapes |= {f"att.{name}1": (c, rank), f"att.{name}2": (rank, c), f"att.{name}0": (1, 1, c)}
    shapes |= {"att.g1": (c, g), "att.g2": (g, c), "att.k_k": (1, 1, c), "att.k_a": (1, 1, c)}
    shapes["att.r_k"] = (c // HEAD_SIZE, HEAD_SIZE)
    shapes |= {f"att.{name}.weight": (c, c) for name in ("receptance", "key", "value", "output")}
    shapes |= {"att.ln_x.weight": (c,), "att.ln_x.bias": (c,)}
    shapes |= {"ffn.x_k": (1, 1, c), "ffn.key.weight": (4 * c, c), "ffn.value.weight": (c, 4 * c)}
    return {f"blocks.{layer}.{name}": shape for name, shape in shapes.items()}


def official_shapes(
    n_layer: int, n_embd: int, n_vocab: int, ranks: tuple[int, int, int, int] = RANKS
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole model in the official order."""
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (n_vocab, n_embd)}
    for layer in range(n_layer):
        shapes |= block_shapes(layer, n_embd, ranks)
    return shapes | {"ln_out.weight": (n_embd,), "ln_out.bias": (n_embd,), "head.weight": (n_vocab, n_embd)}


def random_params(
    n_layer: int = 2,
    n_embd: int = 128,
    n_vocab: int = 96,
    seed: int = 0,
    *,
    ranks: tuple[int, int, int, int] = RANKS,
    dtype: torch.dtype = torch.float32,
    block0_v: bool = True,
    time_state: bool = False,
) -> dict[str, Tensor]:
    """A random model in the official key order; logits spread by about 1.

    block0_v: keep block 0's unused v0/v1/v2, as official files do; time_state: merge an initial state in.
    """
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: _draw(name, shape, generator).to(dtype)
        for name, shape in official_shapes(n_layer, n_embd, n_vocab, ranks).items()
        if block0_v or name not in {f"blocks.0.att.v{i}" for i in range(3)}
    }
    if time_state:
        shape = (n_embd // HEAD_SIZE, HEAD_SIZE, HEAD_SIZE)
        for layer in range(n_layer):
            params[f"blocks.{layer}.att.time_state"] = (0.1 * torch.randn(shape, generator=generator)).to(dtype)
    return params


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    leaf = name.split(".")[-1]
    if leaf in VECTORS:
        centre, spread = VECTORS[leaf]
        values = centre + spread * values
        return values.clamp(0, 1) if leaf.startswith("x_") else values
    if "ln" in name:
        return 1 + 0.2 * values if leaf == "weight" else 0.1 * values
    if leaf == "r_k":
        return 0.1 * values
    if name == "emb.weight":
        return values
    fan_in = shape[0] if leaf[:-1] in "wavg" and leaf[-1] in "12" else shape[1]
    return values / fan_in**0.5
