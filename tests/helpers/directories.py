"""Hugging Face directories of RWKV-7, written by names that stand here once more."""

import json

from safetensors.torch import save_file

FLA = {  # of a block, from the official names
    **{"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm"},
    **{f"att.x_{c}": f"attn.x_{c}" for c in "rwkvag"},
    **{"att.k_k": "attn.k_k", "att.k_a": "attn.k_a", "att.r_k": "attn.r_k"},
    **{"att.receptance": "attn.r_proj", "att.key": "attn.k_proj", "att.value": "attn.v_proj"},
    **{"att.output": "attn.o_proj", "att.ln_x": "attn.g_norm"},
    **{f"att.{c}0": f"attn.{c}_lora.lora.2.bias" for c in "wav"},
    **{f"att.{c}1": f"attn.{c}_lora.lora.0.weight" for c in "wavg"},
    **{f"att.{c}2": f"attn.{c}_lora.lora.2.weight" for c in "wavg"},
    **{"ffn.x_k": "ffn.x_k", "ffn.key": "ffn.key", "ffn.value": "ffn.value"},
}
TOP = {"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight"}
UNUSED = {f"blocks.0.att.v{i}" for i in range(3)}


def fla(name, tensor):
    """Name and value of an official tensor in the naming of flash-linear-attention and rwkv7-hf."""
    if name in TOP:
        return TOP[name], tensor
    if name.startswith("ln_out."):
        return f"model.norm.{name.removeprefix('ln_out.')}", tensor
    _, number, rest = name.split(".", 2)
    ends = next(end for end in (".weight", ".bias", "") if rest.endswith(end))
    inner = rest.removesuffix(ends)
    if inner[-1] in "12" and inner.startswith("att."):
        tensor = tensor.T.contiguous()
    elif inner in ("att.k_k", "att.k_a", "ffn.x_k", "att.w0", "att.a0", "att.v0"):
        tensor = tensor.flatten()
    return f"model.layers.{number}.{FLA[inner]}{ends}", tensor


def linears(name, tensor):
    """The same, with the official names behind a prefix and the low-rank pairs as Linears."""
    if name == "head.weight":
        return name, tensor
    is_pair = ".att." in name and name[-1] in "12"
    return (f"model.{name}.weight", tensor.T.contiguous()) if is_pair else (f"model.{name}", tensor)


def prefixed(name, tensor):
    """The same, with the official names behind another prefix, as they are."""
    return (name if name == "head.weight" else f"rwkv7.{name.replace('emb.', 'embeddings.')}"), tensor


def write_directory(folder, params, naming=fla, num_shards=1, **config):
    """Write weights as a Hugging Face directory. Returns the folder."""
    stored = dict(naming(name, tensor) for name, tensor in params.items() if name not in UNUSED)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "rwkv7", **config}))
    if num_shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = [f"model-{i:05}-of-{num_shards:05}.safetensors" for i in range(1, num_shards + 1)]
    where = {name: files[i % num_shards] for i, name in enumerate(stored)}
    for file in files:
        part = {name: stored[name] for name in stored if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
