import pytest

from rwkv_es.config.objective import Objective, objective_of
from rwkv_es.system.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mean", Objective("mean", 1.0, 0.0)),
        ("pass", Objective("pass", 1.0, 0.0)),
        ("logprob", Objective("", 0.0, 1.0)),
        ("outcome=1,logprob=0.1", Objective("mean", 1.0, 0.1)),
        ("logprob = 2 , maj", Objective("maj", 1.0, 2.0)),
        ("outcome=0,logprob=1", Objective("mean", 0.0, 1.0)),  # looked at in evaluations, not paid
    ],
)
def test_an_objective_is_a_name_or_a_sum(text, expected):
    assert objective_of(text) == expected


@pytest.mark.parametrize(
    "text", ["", "best", "mean,pass", "logprob=-1", "outcome=0", "logprob=x", "logprob=nan", "mean,"]
)
def test_what_is_no_objective_is_refused(text):
    with pytest.raises(ConfigError, match=r"as in outcome=1,logprob=0\.1"):
        objective_of(text)
