"""The official layout of RWKV-7 (x070) models: which tensors there are, and of which shape."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rwkv_es.system.errors import CheckpointError

if TYPE_CHECKING:  # sizes are asked for before torch is loaded
    from torch import Tensor

Params = dict[str, "Tensor"]  # official names and shapes, in the file's order

HEAD_SIZE = 64
STATE = re.compile(r"blocks\.\d+\.att\.time_state")  # the tuned initial state, (H,K_h,K_h) per layer


class Arch(NamedTuple):
    """The sizes of a model."""

    n_layer: int
    n_embd: int
    n_head: int
    head_size: int
    n_vocab: int
    n_ffn: int
    rank_w: int
    rank_a: int
    rank_v: int
    rank_g: int


def refuse_other_models(path: Path, tensors: Params) -> None:
    """Refuse what is recognised, but is not a plain RWKV-7 model."""
    if all(STATE.fullmatch(name) for name in tensors):
        raise CheckpointError(f"{path} holds an initial state alone; give the model's checkpoint")
    for pattern, what in _OTHERS:
        found = next((name for name in tensors if re.search(pattern, name)), None)
        if found:
            raise CheckpointError(f"{path} is {what} (it has {found}); rwkv_es tunes plain RWKV-7 (x070) models only")
    if "emb.weight" not in tensors:
        held = ", ".join(list(tensors)[:3])
        raise CheckpointError(f"{path} is no RWKV-7 checkpoint: emb.weight is missing (it holds {held}, ...)")


_OTHERS = (
    (r"ffn\.s_emb", "an x070a model with DeepEmbed"),
    (r"\.qkv\.", "an x070b model"),
    (r"att\.time_maa_|att\.time_faaaa.*|att\.time_mix_g", "an RWKV-5 or RWKV-6 model"),
    (r"att\.time_decay|att\.time_first", "an RWKV-4, 5 or 6 model"),
    (r"^(model|transformer|rwkv)\.|\.attn\.|\.attention\.|\.feed_forward\.", "in another library's naming"),
    (r"^(module|_orig_mod|_forward_module)\.", "wrapped by a trainer"),
)


def infer(path: Path, tensors: Params) -> Arch:
    """Infer the sizes from the tensors' shapes; `path` is for messages.

    Raises:
        CheckpointError: a tensor that a size is inferred from is missing or malformed.
    """

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"{path} is incomplete: {name} is missing; download or export it again")
        if tensors[name].dim() != dims:
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, not {dims} dimensions")
        return tuple(tensors[name].shape)

    blocks = {int(m[1]): name for name in tensors if (m := re.match(r"blocks\.(\d{1,9})\.", name))}
    n_layer = 1 + max(blocks, default=-1)
    if n_layer > len(tensors):
        raise CheckpointError(f"{path} has {blocks[n_layer - 1]} among only {len(tensors)} tensors; remove it")
    if not n_layer:
        raise CheckpointError(f"{path} is incomplete: blocks.0.att.r_k is missing; download or export it again")
    n_vocab, n_embd = shape("emb.weight", 2)
    n_head, head_size = shape("blocks.0.att.r_k", 2)
    if head_size != HEAD_SIZE or n_head * head_size != n_embd:
        raise CheckpointError(
            f"{path}: blocks.0.att.r_k has shape {(n_head, head_size)}, but a model of width {n_embd} "
            f"needs {n_embd // HEAD_SIZE} heads of size {HEAD_SIZE}"
        )
    last = n_layer - 1  # block 0 may lack the value mix
    ranks = {c: shape(f"blocks.{last if c == 'v' else 0}.att.{c}1", 2)[1] for c in "wag"}
    has_v = f"blocks.{last}.att.v1" in tensors or n_layer > 1
    ranks["v"] = shape(f"blocks.{last}.att.v1", 2)[1] if has_v else 0
    n_ffn = shape("blocks.0.ffn.key.weight", 2)[0]
    return Arch(n_layer, n_embd, n_head, head_size, n_vocab, n_ffn, ranks["w"], ranks["a"], ranks["v"], ranks["g"])


def expected_shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that a model of this size has, less block 0's unused v0, v1, v2."""
    c = arch.n_embd
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (arch.n_vocab, c), "head.weight": (arch.n_vocab, c)}
    norms = ["blocks.0.ln0", "ln_out"] + [f"blocks.{i}.{ln}" for i in range(arch.n_layer) for ln in ("ln1", "ln2")]
    shapes.update({f"{norm}.{part}": (c,) for norm in norms for part in ("weight", "bias")})
    for i in range(arch.n_layer):
        shapes.update({f"blocks.{i}.{name}": shape for name, shape in _block_shapes(arch, has_value_mix=i > 0).items()})
    return shapes


def _block_shapes(arch: Arch, has_value_mix: bool) -> dict[str, tuple[int, ...]]:
    c, f = arch.n_embd, arch.n_ffn
    vectors = [*(f"x_{letter}" for letter in "rwkvag"), "w0", "a0", "k_k", "k_a"] + ["v0"] * has_value_mix
    ranks = {"w": arch.rank_w, "a": arch.rank_a, "g": arch.rank_g, **({"v": arch.rank_v} if has_value_mix else {})}
    return {
        **{f"att.{name}": (1, 1, c) for name in vectors},
        **{f"att.{letter}1": (c, rank) for letter, rank in ranks.items()},
        **{f"att.{letter}2": (rank, c) for letter, rank in ranks.items()},
        "att.r_k": (arch.n_head, arch.head_size),
        **{f"att.{name}.weight": (c, c) for name in ("receptance", "key", "value", "output")},
        **{f"att.ln_x.{part}": (c,) for part in ("weight", "bias")},
        **{"ffn.x_k": (1, 1, c), "ffn.key.weight": (f, c), "ffn.value.weight": (c, f)},
    }


def check_shapes(path: Path, tensors: Params, arch: Arch) -> None:
    """Check that exactly the tensors of such a model are there, each of the right shape.

    Raises:
        CheckpointError: names the first tensor that is missing, unknown or of a different shape.
    """
    expected = expected_shapes(arch)
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise CheckpointError(f"{path} is incomplete: {missing[0]}{more} missing; download or export it again")
    c = arch.n_embd
    states = {f"blocks.{i}.att.time_state" for i in range(arch.n_layer)}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if re.fullmatch(r"blocks\.0\.att\.v[012]", name) and shape[-1:] != () and c in shape:
            continue  # unused there, so of any rank
        wanted = (arch.n_head, HEAD_SIZE, HEAD_SIZE) if name in states else expected.get(name)
        if wanted is None:
            raise CheckpointError(f"{path} has a tensor that no RWKV-7 (x070) model has: {name} {shape}; remove it")
        if shape != wanted:
            raise CheckpointError(f"{path}: {name} has shape {shape}, but this model's sizes need {wanted}")
    num_states = len(states & tensors.keys())
    if num_states not in (0, arch.n_layer):
        raise CheckpointError(f"{path} has an initial state (att.time_state) for {num_states} of {arch.n_layer} layers")
