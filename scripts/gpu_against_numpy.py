"""A case of `bench_gpu.py check`: the GPU engine's logits against float64 numpy."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from gpu_bench import SMALL, Bench

from rwkv_es.gpu import engine as gpu
from rwkv_es.gpu import trial as gpu_trial
from rwkv_es.model.forward import Model, State, draw_factors, new_state, perturb
from rwkv_es.model.weights import Factors, Weights
from rwkv_es.noise.factors import StepNoise


def against_numpy(bench: Bench) -> None:
    """Logits of the model and of members of ranks 1 and 4 against float64 numpy with their matrices written out.

    The reference, in `tests/helpers`, has nothing of the package. A text is read token by token, and at once.
    """
    small = replace(bench, arch=SMALL if bench.device.type == "cuda" else bench.arch)
    model = small.model()
    tokens = (torch.arange(10, device=bench.device).reshape(2, 5) * 37 + 1) % small.arch.n_vocab
    members = [-1, 3]  # the model as it is, and one of direction 1, mirrored
    for rank in (1, 4):
        made = replace(small, rank=rank).noise(model)
        factors = draw_factors(made, model, range(4))
        with gpu.running(model, factors, 8) as engine:
            found = [_read(engine, perturbed(model, factors, members), tokens, at_once) for at_once in (False, True)]
        for row, name in enumerate(("the model", f"W + sigma/sqrt(r) A B^T, rank {rank},")):
            error = _error(model, made, members[row], tokens[row], found[0][row])
            bench.say("check", f"logits of {name} against float64 numpy, relative", error, "", predicted="below 0.06")
        same = torch.equal(*found)
        bench.say("check", f"a text read at once has the bits of token by token, rank {rank}", same, "", predicted=1)


def perturbed(model: Model, factors: Factors, members: list[int]) -> Weights:
    """Return the weights as members see them; -1: the model as it is."""
    numbers = torch.tensor(members, device=model.like.device)
    weights = perturb(model, factors, numbers.clamp(min=0))
    return weights._replace(sign=weights.sign * (numbers >= 0))


def _read(engine: gpu.GpuEngine, weights: Weights, tokens: torch.Tensor, at_once: bool) -> torch.Tensor:
    """Let every row read its tokens; return the logits after the last one."""
    state = new_state(engine.model, len(tokens))
    if at_once:
        gpu_trial.read_at_once(engine, weights, tokens[:, :-1], state)
    else:
        padded = weights.rows(torch.arange(8, device=tokens.device) % len(tokens))  # as many rows as at once
        for column in tokens[:, :-1].T:
            wide = State(*(part.repeat(1, 4, *[1] * (part.dim() - 2)) for part in state))
            engine.read_(padded, column.repeat(4), wide)
            for part, renewed in zip(state, wide):
                part.copy_(renewed[:, : len(tokens)])
    return engine.logits(weights, engine.read_(weights, tokens[:, -1], state))


def _error(model: Model, made: StepNoise, member: int, tokens: torch.Tensor, found: torch.Tensor) -> float:
    """Return how far a row's logits are from float64 numpy's with the member's matrices written out."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
    import reference

    params = {name: tensor.cpu().double() for name, tensor in model.params.items()}
    for name in made.targets if member >= 0 else ():
        a, b = (side[0].cpu().double() for side in made.factors(name, torch.tensor([member // 2])))
        params[name] += (-1) ** member * made.scale(name) * (a @ b.T)
    expected = torch.from_numpy(reference.logits(params, tokens.tolist())[-1])
    return float((found.cpu().double() - expected).norm() / expected.norm())
