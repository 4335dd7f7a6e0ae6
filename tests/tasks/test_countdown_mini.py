"""The recipe that training without a flag follows: it learns to work within a few steps, whatever the seed."""

import pytest

from rwkv_es.cli import main
from rwkv_es.run.ledger import read_metrics


def tuned(folder, *flags):
    """Tune the embedded model by the recipe; return the held-out accuracies."""
    assert main(["train", "--run", str(folder), "--threads", "1", "--tracker", "none", "--device", "cpu", *flags]) == 0
    return [row["eval/accuracy"] for row in read_metrics(folder) if "eval/accuracy" in row]


def test_three_steps_of_the_recipe_find_that_working_pays(tmp_path):
    """Some 5 s of one core; the rate falls over three steps as it would over all."""
    before, after = tuned(tmp_path / "run", "--steps", "3", "--eval-every", "3")
    assert before < 0.15 and after > before + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_recipe_gets_all_right_and_is_done_within_four_steps(tmp_path, seed):
    before, _, fourth, *_, last = tuned(tmp_path / "run", "--seed", str(seed))
    assert before < 0.15 and fourth > 0.9 and last > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--population", "16"], ["--prompts", "2"], ["--steps", "24"]])
def test_the_recipe_bears_fewer_members_fewer_problems_and_more_steps(tmp_path, flags):
    assert tuned(tmp_path / "run", *flags)[-1] > 0.9
