"""What a member is paid for: its answers' rewards, the likelihood of the reference answers, or a sum of both."""

import math
from typing import NamedTuple

from rwkv_es.system.errors import ConfigError

SAMPLES = {"mean": "mean", "outcome": "mean", "pass": "pass", "maj": "maj"}  # which reward of the samples counts
LOGPROB = "logprob"


class Objective(NamedTuple):
    """Weights of the rewards of sampled answers and of the mean log-likelihood of the reference answers."""

    samples: str = "mean"  # which reward of the samples counts: mean, pass, maj; "": nothing is sampled at all
    outcome: float = 1.0
    logprob: float = 0.0

    @property
    def num_kinds(self) -> int:
        """Count in how many ways an evaluation looks at a problem."""
        return bool(self.samples) + bool(self.logprob)


def objective_of(text: str) -> Objective:
    """Read `mean`, `pass`, `maj`, `logprob`, or a sum like `outcome=1,logprob=0.1` (outcome is another word for mean).

    Raises:
        ConfigError: it is something else.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        if name not in (*SAMPLES, LOGPROB) or name in weights:
            raise _refusal(text)
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            raise _refusal(text) from None
    outcomes = [name for name in weights if name != LOGPROB]
    if len(outcomes) > 1 or not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
        raise _refusal(text)
    logprob = weights.get(LOGPROB, 0.0)
    return Objective(SAMPLES[outcomes[0]], weights[outcomes[0]], logprob) if outcomes else Objective("", 0.0, logprob)


def _refusal(text: str) -> ConfigError:
    return ConfigError(
        f"objective must be one of {', '.join((*SAMPLES, LOGPROB))}, or one of the first four and logprob with weights "
        f"of 0 and more, as in outcome=1,logprob=0.1; got {text!r}"
    )
