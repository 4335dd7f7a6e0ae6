"""Schedules against values written out by hand."""

import pytest

from rwkv_es.es.schedule import decay

FIVE_STEPS = {  # from 1 to 0.2 in five steps: at 0, 1/4, 1/2, 3/4 and 1 of the way
    "constant": [1.0, 1.0, 1.0, 1.0, 1.0],
    "linear": [1.0, 0.8, 0.6, 0.4, 0.2],
    "cosine": [1.0, 0.8828427, 0.6, 0.3171573, 0.2],  # 0.6 + 0.4 cos(pi x); cos(pi/4) = 0.7071068
}


@pytest.mark.parametrize("schedule", FIVE_STEPS)
def test_the_factor_falls_from_one_to_its_end_and_stays_there(schedule):
    values = FIVE_STEPS[schedule]
    assert [decay(schedule, step, 5, 0.2) for step in range(8)] == pytest.approx(values + values[-1:] * 3, abs=1e-7)


@pytest.mark.parametrize("schedule", FIVE_STEPS)
def test_a_run_of_a_single_step_takes_it_whole(schedule):
    assert decay(schedule, 0, 1, 0.2) == 1.0
