"""RWKV-7 written out in float64 numpy, one sequence, one token at a time: independent of the package under test."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x, weight, bias, eps):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps) * weight + bias


def logits(params, tokens, initial_state=None):
    """Return the logits after every token: (T,V). params: name -> tensor; initial_state: layer -> (H,64,64)."""
    z = {name: tensor.double().numpy().squeeze() for name, tensor in params.items()}
    num_layers = 1 + max(int(name.split(".")[1]) for name in z if name.startswith("blocks."))
    num_heads, size = params["blocks.0.att.r_k"].shape
    dim = num_heads * size
    states = []
    for i in range(num_layers):
        wkv = np.zeros((num_heads, size, size)) if initial_state is None else initial_state[i].double().numpy().copy()
        states.append([np.zeros(dim), wkv, np.zeros(dim)])
    out = []
    for token in tokens:
        x = norm(z["emb.weight"][token], z["blocks.0.ln0.weight"], z["blocks.0.ln0.bias"], 1e-5)
        v_first = None
        for i, state in enumerate(states):
            p = f"blocks.{i}."
            xa = norm(x, z[p + "ln1.weight"], z[p + "ln1.bias"], 1e-5)
            y, v_first = attention(z, p + "att.", xa, state, v_first, num_heads)
            x = x + y
            xf = norm(x, z[p + "ln2.weight"], z[p + "ln2.bias"], 1e-5)
            mixed = xf + (state[2] - xf) * z[p + "ffn.x_k"]
            state[2] = xf
            hidden = np.maximum(z[p + "ffn.key.weight"] @ mixed, 0) ** 2
            x = x + z[p + "ffn.value.weight"] @ hidden
        x = norm(x, z["ln_out.weight"], z["ln_out.bias"], 1e-5)
        out.append(z["head.weight"] @ x)
    return np.stack(out)


def attention(z, p, x, state, v_first, num_heads):
    shift = state[0] - x
    state[0] = x
    mixed = {c: x + shift * z[p + "x_" + c] for c in "rwkvag"}
    r = z[p + "receptance.weight"] @ mixed["r"]
    k = z[p + "key.weight"] @ mixed["k"]
    v = z[p + "value.weight"] @ mixed["v"]
    decay = np.exp(-0.606531 * sigmoid(z[p + "w0"] + np.tanh(mixed["w"] @ z[p + "w1"]) @ z[p + "w2"]))
    a = sigmoid(z[p + "a0"] + mixed["a"] @ z[p + "a1"] @ z[p + "a2"])
    gate = sigmoid(mixed["g"] @ z[p + "g1"]) @ z[p + "g2"]
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * sigmoid(z[p + "v0"] + mixed["v"] @ z[p + "v1"] @ z[p + "v2"])
    kk = k * z[p + "k_k"]
    k = k * (1 + (a - 1) * z[p + "k_a"])
    size = len(x) // num_heads
    y = np.empty_like(x)
    for h in range(num_heads):
        part = slice(h * size, (h + 1) * size)
        unit = kk[part] / max(np.linalg.norm(kk[part]), 1e-12)
        s = state[1][h]
        s = s * decay[part] - np.outer(s @ unit, unit * a[part]) + np.outer(v[part], k[part])
        state[1][h] = s
        read = norm(s @ r[part], z[p + "ln_x.weight"][part], z[p + "ln_x.bias"][part], 64e-5)
        y[part] = read + (r[part] * k[part] * z[p + "r_k"].reshape(num_heads, size)[h]).sum() * v[part]
    return z[p + "output.weight"] @ (y * gate), v_first
