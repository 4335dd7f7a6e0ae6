"""`rwkv-es train`: evolution strategies with low-rank perturbations (EGGROLL, arXiv 2511.16652)."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

from torch import Tensor

from rwkv_es.config.combinations import idle_here
from rwkv_es.config.file import run_folder
from rwkv_es.config.objective import objective_of
from rwkv_es.config.options import Config, to_dict
from rwkv_es.engine.engines import examined
from rwkv_es.engine.references import Reading
from rwkv_es.es.fitness import combine
from rwkv_es.es.strategy import ES, Step, Update
from rwkv_es.measure.console import readable, step_line
from rwkv_es.measure.health import advise_without_signal, refuse_failing, watch_broken
from rwkv_es.measure.metrics import StepReport, Timer, count, step_metrics
from rwkv_es.measure.progress import progress
from rwkv_es.measure.tracker import open_tracker
from rwkv_es.model.batch import Verdict, say_advice
from rwkv_es.planning.out_of_memory import explaining_out_of_memory
from rwkv_es.planning.preflight import preflight
from rwkv_es.planning.walk import walk_lines
from rwkv_es.reward.adapters import Scorer
from rwkv_es.reward.pool import RewardPool
from rwkv_es.run.cluster import Cluster
from rwkv_es.run.identity import ENGINE_DTYPE, contents, in_words
from rwkv_es.run.joining import joined, refuse_endless_starts
from rwkv_es.run.launcher import tell_again
from rwkv_es.run.ledger import Ledger
from rwkv_es.session import (
    Session,
    answer,
    collect,
    open_environments,
    open_scorers,
    open_session,
    read,
    steady,
)
from rwkv_es.system.errors import ConfigError
from rwkv_es.task.answers import vote
from rwkv_es.task.mixture import draw, refuse_too_few
from rwkv_es.task.splits import say_splits
from rwkv_es.task.task import Problem, Task
from rwkv_es.verbs.upkeep import Run, as_tensor, keep, note, note_samples, restore, say_failure, say_where


def train(config: Config, task: Task | None = None, scorer: Scorer | None = None) -> Path | None:
    """Train as the options say, or go on with a run that was interrupted; a task and a scorer may be Python objects.

    Returns the run folder; None on the processes that do not write it.

    Raises:
        RwkvEsError: something cannot be loaded, written or scored, or another process is lost.
    """
    with joined(config) as cluster, explaining_out_of_memory(config, task):
        session, folder = open_session(config, task), run_folder(config)
        if config.steps:
            refuse_too_few(session.task, config.prompts)
        engine_dtype = str(session.model.like.dtype).removeprefix("torch.")
        if cluster.is_leader:
            for idle in idle_here(config, cluster.size, engine_dtype):
                print(f"rwkv-es: note: {idle.text}", file=sys.stderr)
            say_splits(session.task, is_evaluated=config.eval_every > 0)
        es = ES.of(config, session.model, session.base)
        session = steady_everywhere(cluster, session._replace(model=es.model), es)
        learned_from = contents(config, session.task, session.tokenizer)
        cluster.compare(in_words(learned_from), "has different files:")
        noted = {**learned_from, ENGINE_DTYPE: engine_dtype}
        ledger = cluster.on_leader(lambda: Ledger.open(folder, to_dict(config), session.base_path, noted))
        try:
            with (
                open_scorers(_scoring(config, cluster), scorer) as scorers,
                open_environments(config, session, task) as session,
            ):
                cluster.on_leader(
                    lambda: None if ledger is None or ledger.steps else _look_ahead(config, session, scorers)
                )
                if cluster.broadcast(scorers.has_spoken):
                    scorers.say_failure(None)  # rank 0 has said it, of a reference answer
                _go_on(Run(config, cluster, session, es, scorers, ledger))
        finally:
            if ledger is not None:
                ledger.close()
    return folder if cluster.is_leader else None


def _look_ahead(config: Config, session: Session, scorers: RewardPool) -> None:
    """Before the first step, check what is asked and scored; say how far the weights will walk."""
    preflight(config, session, scorers)
    for line in walk_lines(config, session.model.arch.n_embd):
        print(line)


def steady_everywhere(cluster: Cluster, session: Session, es: ES) -> Session:
    """Return the session with products of as many rows as every process's machine needs."""
    mine = examined(session.model, session.decoding, es.ask(range(1)).factors)
    verdict = reduce(Verdict.joined, [cluster.broadcast(mine, other) for other in range(cluster.size)])
    if cluster.is_leader:
        say_advice(verdict)
    return steady(session, verdict)


def _go_on(run: Run) -> None:
    """Take the steps that are left."""
    past = restore(run)
    run.cluster.on_leader(lambda: refuse_endless_starts(past.num_steps))
    if run.ledger is not None:
        say_where(run.ledger)
    folder = run.ledger.folder if run.ledger is not None else None
    with open_tracker(run.config, folder, past.num_steps) as tracker:
        run = run._replace(tracker=tracker)
        is_over = keep(run, past.held_out)
        while not is_over:
            run.cluster.place = f"step {run.es.step + 1}"
            take_step(run)
            tell_again("step")
            is_over = keep(run)


def take_step(run: Run) -> None:
    """Let every member answer the step's problems; move the weights along the members that did better."""
    config, timer, num_pairs = run.config, Timer(), run.config.population // 2
    problems = draw_problems(config, run.session.task.problems("train"), run.es.step)
    members = run.es.ask(run.cluster.shard(num_pairs))  # of this process
    objective = objective_of(config.objective)
    asked, told = problems if objective.outcome else [], problems if objective.logprob else []
    num_answers = len(members.ids) * (len(asked) * config.samples + len(told))
    with progress(f"step {run.es.step + 1}", num_answers, run.cluster.is_leader) as advance:
        answers = answer(run.session, asked, members, config.samples, run.scorers, advance=advance)
        reading = read(run.session, told, members, advance)
    timer.lap("generate_s")
    scores = collect(answers, run.scorers)
    timer.lap("score_s")
    rewards = paid(config, scores.rewards, answers.texts, reading)
    mine = StepReport(rewards, count(answers, scores, reading), scores.metrics)
    report = mine.gathered(run.cluster, num_pairs, timer.total_s, run.scorers.is_users)
    say_failure(run, report.failing, scores)
    refuse_failing(config, report.counted, scores)
    watch_broken(run.es, report.counted, members, answers, reading)
    timer.lap("wait_s")
    update = run.es.tell(report.rewards)
    timer.lap("update_s")
    checked = agreed_checksum(run)
    if run.ledger is not None:
        still = run.ledger.num_without_signal + bool((update.fitness[::2] == update.fitness[1::2]).all())
        metrics = step_metrics(report, update, timer, still)
        note(run, run.es.step, metrics)
        note_samples(run, run.es.step, readable(answers, scores))
        run.ledger.append(recorded(report, update, checked, timer.total_s))
        print(step_line(config.steps, update.step, metrics), flush=True)
        advise_without_signal(config, run.ledger.num_in_a_row_without_signal, report.rewards)


def recorded(report: StepReport, update: Update, checked: str, seconds: float) -> Step:
    """Return the ledger's record of a step."""
    rewards, fitness, tokens = report.rewards.tolist(), update.fitness.tolist(), int(report.counted.read)
    return Step(update.step, rewards, fitness, update.sigma, update.lr, tokens, seconds, checked)


def agreed_checksum(run: Run) -> str:
    """Return the checksum of the weights ("" if nobody asks for it); compare it with the others' now and then."""
    is_time = run.es.step % run.config.checksum_every == 0 or run.es.step == run.config.steps
    found = run.es.checksum() if is_time or run.cluster.is_leader else ""
    if is_time:
        run.cluster.agree("the weights", found)
    return found


def draw_problems(config: Config, problems: Sequence[Problem], step: int) -> list[Problem]:
    """Return the step's problems, a pure function of (seed, step): see `mixture.draw`."""
    first = step * config.prompts
    return [draw(problems, config.seed, position) for position in range(first, first + config.prompts)]


def paid(config: Config, rewards: Sequence[float | None], texts: Sequence[str], reading: Reading) -> Tensor:
    """Return what the objective makes of the samples' rewards and of the reference answers: (N,P) float64."""
    objective = objective_of(config.objective)
    parts = []
    if objective.outcome:
        parts.append(objective.outcome * as_matrix(rewards, config, texts))
    if objective.logprob:
        parts.append(objective.logprob * reading.per_token)
    return sum(parts[1:], parts[0])


def as_matrix(rewards: Sequence[float | None], config: Config, texts: Sequence[str] = ()) -> Tensor:
    """Combine the samples: rewards in the order member, problem, sample -> (N,P) float64, NaN if all are missing."""
    how = objective_of(config.objective).samples
    votes = [vote(text) for text in texts] if how == "maj" else []
    return combine(as_tensor(rewards).reshape(-1, config.prompts, config.samples), how, votes)


def _scoring(config: Config, cluster: Cluster) -> Config:
    """Return the options for the scorers: with several processes, `refuse_failing` judges what fails in all of them.

    Raises:
        ConfigError: a reward is to see together what no process has together.
    """
    if cluster.size > 1 and config.reward_group != "pair":
        raise ConfigError(
            f"reward_group {config.reward_group} puts answers of all members together, and {cluster.size} processes "
            "have some each; train in one process, or take reward_group pair"
        )
    return config if cluster.size == 1 else replace(config, reward_error_limit=1.0)
