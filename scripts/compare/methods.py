"""All methods by name, in the order of the tables."""

from types import ModuleType

from . import (
    cma_es,
    dr_grpo,
    eggroll,
    es_at_scale,
    genetic,
    grpo,
    openai_es,
    ours,
    ppo,
    random_search,
    sep_cma,
)

METHODS: dict[str, ModuleType] = {
    "ours": ours,
    "eggroll": eggroll,
    "es_at_scale": es_at_scale,
    "openai_es": openai_es,
    "genetic": genetic,
    "cma_es": cma_es,
    "sep_cma": sep_cma,
    "random_search": random_search,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "ppo": ppo,
}
