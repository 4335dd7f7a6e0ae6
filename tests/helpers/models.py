"""Small models of the official layout, and their logits token by token."""

import torch
from checkpoints import random_params

from rwkv_es.model import forward as torch_engine
from rwkv_es.model.forward import (
    Model,
    new_state,
    reset_rows_,
)
from rwkv_es.model.weights import Weights
from rwkv_es.pretrained import checkpoint

KINDS = {
    "matrices": {"matrices": 1.0},
    "embedding": {"emb.weight": 1.0},
    "head": {"head.weight": 1.0},
    "vectors": {"vectors": 1.0},
    "state": {"state": 1.0},
    "everything": {"*": 1.0},
}


def make_model(tmp_path, n_layer=2, n_embd=128, n_vocab=64, seed=0, dtype=torch.float32):
    checkpoint.save(tmp_path / "model.pth", random_params(n_layer, n_embd, n_vocab, seed))
    params, arch = checkpoint.load(tmp_path / "model.pth")
    return Model({name: tensor.to(dtype, copy=True) for name, tensor in params.items()}, arch)


def random_tokens(rows, length, n_vocab, seed=0):
    return torch.randint(0, n_vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def decode(model, tokens, weights=None, engine=torch_engine):
    """Read tokens (S,T) one by one; return the logits (S,T,V)."""
    weights = weights or Weights(model.params)
    state = new_state(model, len(tokens))
    reset_rows_(state, weights, torch.arange(len(tokens)))
    ticks = (engine.logits(weights, engine.forward(weights, model.arch, column, state)) for column in tokens.T)
    return torch.stack(list(ticks), 1)


def written_out(model, noise, member):
    """Return the parameters of a member with `W + s sigma/sqrt(r) A B.T` in place of every target."""
    params = dict(model.params)
    for name in noise.targets:
        a, b = noise.factors(name, torch.tensor([member // 2]))
        delta = (a[0].double() @ b[0].double().mT) * (noise.scale(name) * (1 if member % 2 == 0 else -1))
        params[name] = params[name].double() + delta.reshape(params[name].shape)
    return params


def byte_model(folder):
    """A random model whose vocabulary is all bytes. Returns its file; the tokenizer lies beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    checkpoint.save(folder / "bytes.pth", random_params(2, 64, 1 + len(alphabet)))
    tokenizer.save(str(folder / "bytes.tokenizer.json"))
    return folder / "bytes.pth"
