"""Fine-tune RWKV-7 language models on a reward with low-rank evolution strategies.

    model, tokenizer = load_model("tiny")
    es = ES(model, sigma=3e-3, lr=2e-3, population=64)
    texts = generate(model, tokenizer, prompts, es.ask())  # [member][prompt]
    es.tell(rewards)                                       # (N,P)

Names are loaded when they are first used: importing the package loads neither torch nor a model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_es.api import evaluate, export, load_task, train
    from rwkv_es.engine.generate import generate
    from rwkv_es.es.strategy import ES
    from rwkv_es.model.sampler import SamplingParams
    from rwkv_es.pretrained.load import load_model
    from rwkv_es.system.errors import RwkvEsError
    from rwkv_es.task import Problem

__version__ = "0.1.0"
__all__ = [
    "ES",
    "Problem",
    "RwkvEsError",
    "SamplingParams",
    "__version__",
    "evaluate",
    "export",
    "generate",
    "load_model",
    "load_task",
    "train",
]

_PLACES = {
    "ES": "rwkv_es.es.strategy",
    "Problem": "rwkv_es.task",
    "RwkvEsError": "rwkv_es.system.errors",
    "SamplingParams": "rwkv_es.model.sampler",
    "generate": "rwkv_es.engine.generate",
    "load_model": "rwkv_es.pretrained.load",
    **dict.fromkeys(("evaluate", "export", "load_task", "train"), "rwkv_es.api"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
