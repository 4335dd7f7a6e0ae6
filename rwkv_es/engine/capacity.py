"""How many generations are in flight where the user does not say: 256 on a CPU, as many as fit on a GPU."""

import os

import torch

from rwkv_es.config.objective import objective_of
from rwkv_es.config.options import Config
from rwkv_es.engine.memory import DEFAULT_SLOTS, SLOTS_AT_ONCE, Load, most_slots, targets_of
from rwkv_es.model.forward import Model
from rwkv_es.system.errors import ConfigError

_MARGIN = 0.95  # of what is free: graphs and the libraries' workspaces take some
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def slots_of(config: Config, model: Model, *, has_turns: bool = False) -> int:
    """Return the option `slots`, or what is chosen in its place, once the model is on its device.

    Raises:
        ConfigError: not even a few generations fit.
    """
    if config.slots or model.like.device.type == "cpu":
        return config.slots or DEFAULT_SLOTS
    total = int(_MARGIN * _free(model)) + sum(
        tensor.nbytes for tensor in (*model.params.values(), *model.scales.values())
    )
    load = Load(
        slots=1,
        population=config.population,
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        dtype=_DTYPES[model.like.dtype],
        quantize=config.quantize,
        state_dtype=config.state_dtype,
        master=config.master,
        optimizer=config.optimizer,
        engine="torch" if has_turns or config.engine == "torch" else "triton",
        temperature=config.temperature,
        is_cut=config.top_p < 1 or config.top_k > 0 or config.min_p > 0,
        saved_per_slot=(config.samples > 1) + (config.shots != "0" or bool(config.system)),
        has_turns=has_turns,
        has_references=objective_of(config.objective).logprob > 0,
        device="cuda",
        card=total,
    )
    most, memory = most_slots(total, model.arch, targets_of(model.arch, config.targets, config.rank), load)
    if not most:
        raise ConfigError(
            f"no generation fits: {memory.peak / 1e9:.1f} GB are needed for a few and {total / 1e9:.1f} GB are there; "
            "try --quantize int8, --state-dtype fp16, a smaller population or fewer targets"
        )
    return most // SLOTS_AT_ONCE * SLOTS_AT_ONCE or most


def _free(model: Model) -> int:
    return torch.cuda.mem_get_info(model.like.device)[0]
