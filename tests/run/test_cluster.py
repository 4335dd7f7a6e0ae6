"""Many processes, the same bits; one that is lost, hangs or differs is named."""

import json
import os
import re
import shutil
import signal
import time

import jobs
import pytest
import torch
from jobs import arguments, finish, run_together, start_together

from rwkv_es.cli import main
from rwkv_es.es.strategy import ES
from rwkv_es.measure.metrics import averaged, packed
from rwkv_es.run.cluster import Cluster, shard
from rwkv_es.run.launcher import LOST
from rwkv_es.system.errors import ConfigError


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_LOGS", str(tmp_path))
    yield
    jobs.end_all()


def rows(folder, name="ledger.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def checksums(folder):
    return [row["checksum"] for row in rows(folder)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(arguments(folder)) == 0
    assert len(set(checksums(folder))) > 3
    return folder


SLOW = pytest.mark.slow


def untimed(row):
    return {name: value for name, value in row.items() if name not in ("time", "elapsed_s")}


@pytest.mark.promise
@pytest.mark.parametrize(
    "size, options",
    [(4, {"slots": 64}), (2, {"reward_workers": 1}), pytest.param(3, {"reward_workers": 2, "slots": 16}, marks=SLOW)],
)
def test_any_number_of_processes_gives_the_same_bits(alone, tmp_path, size, options):
    codes, outputs = run_together(size, arguments(tmp_path / "run", **options))
    assert codes == [0] * size, outputs
    assert checksums(tmp_path / "run") == checksums(alone)
    for name in ("rewards", "fitness", "tokens"):
        assert [row[name] for row in rows(tmp_path / "run")] == [row[name] for row in rows(alone)]
    held_out = [[r for r in rows(f, "metrics.jsonl") if "eval/reward" in r] for f in (tmp_path / "run", alone)]
    assert [untimed(row) for row in held_out[0]] == [untimed(row) for row in held_out[1]]
    assert not any("step" in output for output in outputs[1:]), "rank 0 alone speaks"
    waits = [row for row in rows(tmp_path / "run", "metrics.jsonl") if f"wait_s_of_rank_{size - 1}" in row]
    assert len(waits) == 5 and min(waits[0][f"wait_s_of_rank_{rank}"] for rank in range(size)) == 0


@pytest.mark.slow
@pytest.mark.promise
@pytest.mark.parametrize("engine", ["torch", "numba"])
@pytest.mark.parametrize("slots", [256, 40, 20])  # 48 requests: 12 in each of four processes
def test_four_processes_of_few_members_equal_one(tmp_path, engine, slots):
    options = {"population": 24, "engine": engine, "steps": 3, "slots": slots}
    assert main(arguments(tmp_path / "alone", **{**options, "slots": 48})) == 0
    codes, outputs = run_together(4, arguments(tmp_path / "run", **options))
    assert codes == [0] * 4, outputs
    assert len(set(checksums(tmp_path / "alone"))) == 3
    for name in ("rewards", "fitness", "tokens", "checksum"):
        assert [row[name] for row in rows(tmp_path / "run")] == [row[name] for row in rows(tmp_path / "alone")]


@pytest.mark.slow
@pytest.mark.promise
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("slots", [8, 24, 64, 256])
def test_processes_slots_and_threads_change_no_bit(alone, tmp_path, slots, threads):
    whole = checksums(alone)
    for size in (1, 2, 3, 4):
        folder, options = tmp_path / f"run-{size}", {"slots": slots, "threads": threads, "max_new_tokens": 40}
        codes, outputs = run_together(size, arguments(folder, **options, steps=3))
        assert codes == [0] * size, outputs
        assert not any("note:" in output or "other bits" in output for output in outputs), outputs
        resumed = [*arguments(folder, **options), f"--slots={264 - slots}", f"--threads={3 - threads}"]
        codes, outputs = run_together(5 - size, resumed)
        assert codes == [0] * (5 - size), outputs
        assert checksums(folder) == whole, (size, slots, threads)
        assert main(["replay", str(folder)]) == 0


@pytest.mark.promise
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "numba"])
def test_four_processes_with_fewer_requests_than_slots_are_one(tmp_path, engine):
    options = {"engine": engine, "population": 24, "steps": 3, "eval_every": 0}
    assert main(arguments(tmp_path / "one", **options)) == 0
    codes, outputs = run_together(4, arguments(tmp_path / "run", **options))
    assert codes == [0] * 4, outputs
    assert checksums(tmp_path / "run") == checksums(tmp_path / "one")
    assert len(set(checksums(tmp_path / "run"))) > 1


@pytest.mark.promise
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    options = {"optimizer": "adam", "eval_every": 0}
    assert main(arguments(tmp_path / "run", steps=3, **options)) == 0  # the last step is behind the last snapshot
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    codes, outputs = run_together(2, arguments(tmp_path / "run", steps=4, **options))
    assert codes == [0, 0], outputs
    assert main(arguments(tmp_path / "whole", steps=4, **options)) == 0
    assert checksums(tmp_path / "run") == checksums(tmp_path / "whole")


OWN = """
def length(completions, log_metric, **columns):
    log_metric("characters", float(len(completions[0])))
    return [float("1" in text) for text in completions]
"""


def test_what_rewards_log_is_averaged_over_all_processes(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    options = {"reward": tmp_path / "own.py:length", "eval_every": 0, "steps": 1}
    assert main(arguments(tmp_path / "alone", **options)) == 0
    codes, outputs = run_together(2, arguments(tmp_path / "run", **options))
    assert codes == [0, 0], outputs
    ((one,), (two,)) = (rows(tmp_path / name, "metrics.jsonl") for name in ("alone", "run"))
    names = {name for name in one if name.startswith(("log/", "reward/"))}
    assert len(names) == 2
    assert {name: one[name] for name in names} == pytest.approx({name: two[name] for name in names}, rel=1e-12)


def test_logged_numbers_under_other_names_are_left_out_of_the_average():
    said = torch.tensor([packed(logs) for logs in ({"a": 1.0, "b": 2.0}, {"b": 7.0}, {"b": 4.0, "a": 3.0})])
    assert averaged({"a": 1.0, "b": 2.0}, said) == {"a": 2.0, "b": 3.0}
    many = {f"{i:02d}": float(i) for i in range(20)}
    assert len(packed(many)) == len(packed({})) == 17
    assert averaged(many, torch.tensor([packed(many)])) == many


def at_step(number, act, on_rank=1):
    """Let a rank do something in the midst of a step."""
    whole = ES.tell

    def sabotage(rank):
        def tell(es, rewards):
            if rank == on_rank and es.step == number - 1:
                act(es)
            return whole(es, rewards)

        ES.tell = tell

    return sabotage


def die_at_step_3(rank):
    at_step(3, jobs.kill_self)(rank)


def hang_at_step_1(rank):
    at_step(1, lambda _: os.kill(os.getpid(), signal.SIGSTOP))(rank)


def flip_a_bit_at_step_2(rank):
    def flip(es):
        es.model.params["blocks.0.att.key.weight"].view(torch.int32)[0, 0] ^= 1

    at_step(2, flip)(rank)


def test_a_rank_that_dies_is_named_with_host_and_step_and_the_run_goes_on_later(alone, tmp_path):
    codes, outputs = run_together(2, arguments(tmp_path / "run"), die_at_step_3)
    assert codes == [LOST, -signal.SIGKILL]
    last = outputs[0].splitlines()[-1]
    assert f"rank 1 on host {os.uname().nodename} died, hung or cannot be reached at step" in last
    assert main(arguments(tmp_path / "run")) == 0
    assert checksums(tmp_path / "run") == checksums(alone)


def test_the_death_of_rank_0_ends_the_others(tmp_path):
    codes, outputs = run_together(2, arguments(tmp_path / "run", eval_every=0), die_rank_0_at_step_2)
    assert codes == [-signal.SIGKILL, LOST]
    assert "rank 0 on host" in outputs[1]


def die_rank_0_at_step_2(rank):
    at_step(2, jobs.kill_self, on_rank=0)(rank)


def test_a_rank_that_hangs_is_named_after_the_time_limit(tmp_path):
    began = time.monotonic()
    started = start_together(2, arguments(tmp_path / "run", rank_timeout=1, eval_every=0), hang_at_step_1)
    started[0][0].join(30)
    assert time.monotonic() - began < 30
    started[1][0].kill()
    codes, outputs = finish(started)
    assert codes[0] == LOST
    assert f"rank 1 on host {os.uname().nodename} died, hung" in outputs[0]
    assert "no word for 1 s" in outputs[0]


def test_a_rank_whose_weights_differ_is_named(tmp_path):
    codes, outputs = run_together(3, arguments(tmp_path / "run", checksum_every=2, eval_every=0), flip_a_bit_at_step_2)
    assert codes == [LOST] * 3
    assert all(
        "the weights of rank 1 on host" in text and "differ from those of rank 0 at step 2" in text for text in outputs
    )
    assert len(rows(tmp_path / "run")) == 1, "a step that not all agree on is not taken"


def test_processes_with_other_options_are_named(tmp_path):
    codes, outputs = run_together(2, [arguments(tmp_path / "run"), arguments(tmp_path / "run", lr=0.5)])
    assert codes == [2, 2]
    (text,) = filter(None, outputs)
    assert "rank 1 on host" in text and "lr 0.5 (rank 0: 0.02)" in text


def test_what_rank_0_finds_wrong_is_said_once(alone, tmp_path):
    codes, outputs = run_together(2, arguments(alone, resume="never"))
    assert codes[0] == 2 and codes[1] != 0
    assert "holds a run; choose another --run" in outputs[0]
    assert outputs[1] == ""


def mistaken_at_step_2(rank):
    def fail(_):
        raise ConfigError("the disk is full")

    at_step(2, fail, on_rank=0)(rank)


def mistaken_elsewhere_at_step_2(rank):
    def fail(_):
        raise ZeroDivisionError("a bug")

    at_step(2, fail, on_rank=1)(rank)


@pytest.mark.parametrize(
    "sabotage, rank, words",
    [(mistaken_at_step_2, 0, "rwkv-es: the disk is full"), (mistaken_elsewhere_at_step_2, 1, "ZeroDivisionError")],
)
def test_a_mistake_that_one_process_meets_is_said_by_it_and_the_others_do_not_speak_of_a_loss(
    tmp_path, sabotage, rank, words
):
    codes, outputs = run_together(2, arguments(tmp_path / "run", eval_every=0), sabotage)
    assert words in outputs[rank]
    assert codes[1 - rank] == 2 and codes[rank] != LOST
    assert "same command" not in "".join(outputs)


def test_a_population_too_small_for_the_processes_is_refused(tmp_path):
    codes, outputs = run_together(2, arguments(tmp_path / "run", population=2))
    assert codes == [2, 2]
    (text,) = filter(None, outputs)
    assert "population 2 has too few mirrored pairs for 2 processes" in text


TASK = """
from rwkv_es.task import load_task
tiny = load_task("countdown_mini")
VERSION, STOP, MAX_NEW_TOKENS, TEMPLATE = "1", tiny.stop, tiny.max_new_tokens, tiny.template
def problems(split, data=""):
    return tiny.problems(split)
def reward(problem, text):
    {body}
"""


def test_rewards_that_all_fail_stop_every_process_with_the_first_traceback(tmp_path):
    body = "if tiny.reward(problem, text) == 1: return 1.0\n    raise ValueError('no such thing')"
    (tmp_path / "task.py").write_text(TASK.format(body=body))
    argv = arguments(tmp_path / "run", task=tmp_path / "task.py", eval_every=0)
    codes, outputs = run_together(2, argv)
    assert codes == [2, 2]
    assert sum(bool(re.search(r"failed on \d+ of 16 answers(.|\n)*no such thing", text)) for text in outputs) == 1


def test_sigterm_abandons_the_step_and_the_run_goes_on(alone, tmp_path):
    slow = f"import os, time; os.path.exists('{tmp_path}/fast') or found == 1 or time.sleep(0.05)"
    (tmp_path / "task.py").write_text(TASK.format(body=f"found = tiny.reward(problem, text); {slow}; return found"))
    argv = arguments(tmp_path / "run", task=tmp_path / "task.py", eval_every=0)
    started = start_together(2, argv)
    ledger = tmp_path / "run" / "ledger.jsonl"
    while not (ledger.exists() and ledger.read_text()):
        time.sleep(0.02)
    for process, _ in started:
        process.terminate()
    began = time.monotonic()
    codes, outputs = finish(started)
    assert codes == [143, 143], outputs
    assert time.monotonic() - began < 5
    assert "rwkv-es: stopped; the same command" in outputs[0] and outputs[1] == ""
    assert 0 < len(rows(tmp_path / "run")) < 5
    (tmp_path / "fast").touch()
    assert main(argv) == 0
    assert checksums(tmp_path / "run") == checksums(alone)


def test_shards_are_contiguous_whole_and_even():
    for count, size in [(8, 3), (4, 4), (1, 2), (129, 8)]:
        parts = [shard(count, rank, size) for rank in range(size)]
        assert [i for part in parts for i in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_alone_gathers_what_it_has():
    rewards, counters = Cluster().gather(torch.tensor([[1.0, torch.nan]], dtype=torch.float64), 1, [3, 4])
    assert rewards[0, 0] == 1 and rewards[0, 1].isnan() and counters.tolist() == [[3.0, 4.0]]


def test_rewards_that_compare_see_the_same_groups_in_any_number_of_processes_and_fail_once(tmp_path, capsys):
    """Answers are compared with those of the mirrored member and of the other samples; an odd length is a failure."""
    (tmp_path / "trl.py").write_text(
        "def f(completions, **kwargs):\n"
        "    order = sorted(map(len, completions))\n"
        "    return [order.index(len(c)) if len(c) % 16 else 1 / 0 for c in completions]\n"
    )
    options = {
        "reward": f"{tmp_path}/trl.py:f",
        "samples": 2,
        "temperature": 1.0,
        "sigma": 0.1,
        "steps": 2,
        "reward_error_limit": 1.0,
    }
    assert main(arguments(tmp_path / "one", **options)) == 0
    codes, outputs = run_together(2, arguments(tmp_path / "two", **options))
    assert codes == [0, 0], outputs
    assert checksums(tmp_path / "two") == checksums(tmp_path / "one")
    assert len(set(checksums(tmp_path / "two"))) == 2, "the weights moved"
    said = [
        text.count("ZeroDivisionError: division by zero\n  on the answer")
        for text in (capsys.readouterr().err, "".join(outputs))
    ]
    assert said == [1, 1], outputs


def test_processes_that_have_some_members_each_refuse_groups_of_all(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    options = {"reward": tmp_path / "own.py:length", "reward-group": "problem", "steps": 1}
    codes, outputs = run_together(2, arguments(tmp_path / "run", **options))
    assert codes == [2, 2] and "train in one process, or take reward_group pair" in "".join(outputs)
