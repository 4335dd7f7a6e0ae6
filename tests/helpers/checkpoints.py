"""Random RWKV-7 models in the official layout: every parameter differs from its neutral value, so mix-ups show."""

import torch


def random_params(n_layer, n_embd, n_vocab, seed=0, ranks=(8, 8, 8, 16), dtype=torch.float32):
    """Return name -> tensor in official key order; ranks are those of w, a, v, g. Logits have a spread of about 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, mean=0.0, std=1.0):
        return torch.randn(*shape, generator=generator) * std + mean

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    params = {"emb.weight": normal(n_vocab, n_embd)}
    for i in range(n_layer):
        block = f"blocks.{i}."
        for name in ("ln0", "ln1", "ln2") if i == 0 else ("ln1", "ln2"):
            params[f"{block}{name}.weight"] = normal(n_embd, mean=1.0, std=0.1)
            params[f"{block}{name}.bias"] = normal(n_embd, std=0.1)
        params.update({f"{block}att.{name}": value for name, value in _attention(n_embd, ranks, normal, uniform)})
        params[block + "ffn.x_k"] = uniform(1, 1, n_embd)
        params[block + "ffn.key.weight"] = normal(4 * n_embd, n_embd, std=n_embd**-0.5)
        params[block + "ffn.value.weight"] = normal(n_embd, 4 * n_embd, std=0.3 * (4 * n_embd) ** -0.5)
    params["ln_out.weight"] = normal(n_embd, mean=1.0, std=0.1)
    params["ln_out.bias"] = normal(n_embd, std=0.1)
    params["head.weight"] = normal(n_vocab, n_embd, std=n_embd**-0.5)
    return {name: tensor.to(dtype) for name, tensor in params.items()}


def _attention(n_embd, ranks, normal, uniform):
    for c in "rwkvag":
        yield f"x_{c}", uniform(1, 1, n_embd)
    for letter, rank, bias in zip("wav", ranks, (-2.0, 0.0, 1.0)):
        yield f"{letter}0", normal(1, 1, n_embd, mean=bias)
        yield f"{letter}1", normal(n_embd, rank, std=n_embd**-0.5)
        yield f"{letter}2", normal(rank, n_embd, std=rank**-0.5)
    yield "g1", normal(n_embd, ranks[3], std=n_embd**-0.5)
    yield "g2", normal(ranks[3], n_embd, std=ranks[3] ** -0.5)
    yield "k_k", normal(1, 1, n_embd, mean=0.85, std=0.1)
    yield "k_a", normal(1, 1, n_embd, mean=1.0, std=0.1)
    yield "r_k", normal(n_embd // 64, 64, std=0.1)
    for name in ("receptance", "key", "value"):
        yield f"{name}.weight", normal(n_embd, n_embd, std=n_embd**-0.5)
    yield "output.weight", normal(n_embd, n_embd, std=0.3 * n_embd**-0.5)
    yield "ln_x.weight", normal(n_embd, mean=1.0, std=0.1)
    yield "ln_x.bias", normal(n_embd, std=0.1)
