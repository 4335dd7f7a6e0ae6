"""`rwkv-es replay`, `fork` and `apply`: a run's past, verified, taken up anew, and rebuilt elsewhere."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rwkv_es.config.options import PROVENANCE, Config, build
from rwkv_es.es.fitness import shape
from rwkv_es.es.strategy import ES, Step
from rwkv_es.es.update import checksum
from rwkv_es.pretrained import checkpoint
from rwkv_es.pretrained.exported import export_params
from rwkv_es.pretrained.header import resolve
from rwkv_es.run.identity import ENGINE_DTYPE, FORKED_AT, config_text, read_config
from rwkv_es.run.record import chained, read_steps, unpacked
from rwkv_es.run.snapshots import Snapshot, named_best, read_snapshot, save_snapshot, snapshot_steps
from rwkv_es.session import open_model
from rwkv_es.system import files
from rwkv_es.system.errors import CheckpointError, ConfigError


def replay(config: Config) -> None:
    """Rebuild the weights of the run `config.run` after `config.step` steps from base and ledger; compare checksums.

    With step -1 every step is verified, and every snapshot. Nothing is changed in the folder.

    Raises:
        ConfigError, CheckpointError: something is not what was written; it is named.
    """
    folder = Path(config.run)
    steps = _steps_until(folder, config.step)
    es = _open_run(folder)
    _check_fitness(folder, steps)
    for step in es.replay(steps):
        print(f"step {step.step + 1}: weights {step.checksum} as in the ledger", flush=True)
    for number in snapshot_steps(folder):
        if number > len(steps) and config.step == -1:
            raise ConfigError(f"{folder} has a snapshot of step {number}, but its ledger ends with step {len(steps)}")
        if config.step in (-1, number):
            _check_snapshot(folder, number, steps[number - 1])
            print(f"snapshot of step {number}: weights {steps[number - 1].checksum} as in the ledger")
    print(f"{folder}: {len(steps)} steps rebuilt from the base, all as they were trained")


def fork(config: Config) -> Path:
    """Start a run in the folder `config.out` that shares the first `config.step` steps of the run `config.run`.

    Its weights are rebuilt and verified. Before its first own step, most options of the fork may be changed.

    Raises:
        ConfigError, CheckpointError: the new folder is taken, or something is not what was written.
    """
    folder, target = Path(config.run), Path(config.out)
    if config.step < 1 or not config.out:
        raise ConfigError("fork needs a step and a folder: rwkv-es fork RUN --step 20 --out NEW_RUN")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; choose another --out")
    steps = _steps_until(folder, config.step)
    es = _open_run(folder)
    for _ in es.replay(steps):
        pass
    with files.whole_or_gone(target):
        _write_fork(folder, target, steps, es)
    print(f"wrote {target}: {len(steps)} steps of {folder}; go on with")
    print(f"rwkv-es train --config {target}/config.yaml")
    return target


def apply(base: Path, ledger: Path, out: Path, step: int = -1) -> list[Path]:
    """Rebuild a run's weights from a base and its ledger, wherever both are, and write them as its export does.

    ledger: the run's folder, of which config.yaml and ledger.jsonl are enough, or the ledger itself. step: how many
    steps; -1: as many as the best weights have taken, where the folder knows them, else all. Returns the files.

    Raises:
        ConfigError, CheckpointError: something is not what the ledger speaks of, or a file is there already.
    """
    folder = ledger if ledger.is_dir() else ledger.parent
    known = named_best(folder)
    steps = _steps_until(folder, known.step if step == -1 and known is not None else step)
    es = _open_run(folder, base)
    for _ in es.replay(steps):
        pass
    rounded = read_config(folder)[PROVENANCE].get(ENGINE_DTYPE) != "float32"
    written = export_params(es.weights(), resolve(str(base)), out, was_rounded=rounded)
    for path in written:
        print(f"wrote {path} (weights after {len(steps)} steps, sha256 {checkpoint.sha256(path)})")
    return written


def _steps_until(folder: Path, num_steps: int) -> list[Step]:
    read_config(folder)
    steps = read_steps(folder)
    if num_steps > len(steps) or num_steps == 0:
        raise ConfigError(f"{folder} has steps 1 to {len(steps)}; there is no step {num_steps}")
    return steps if num_steps == -1 else steps[:num_steps]


def _options(folder: Path) -> Config:
    values = read_config(folder)
    return build({name: value for name, value in values.items() if name != PROVENANCE})


def _open_run(folder: Path, of: Path | None = None) -> ES:
    """Return the run's model as it was before the first step; of: its base, where that has been moved."""
    made_with, options = read_config(folder)[PROVENANCE], _options(folder)
    path, base, model = open_model(options if of is None else replace(options, model=str(of)))
    found = checkpoint.sha256(path)
    if found != made_with["base_sha256"]:
        raise CheckpointError(f"{path} has the sha256 {found}, but the run's base has {made_with['base_sha256']}")
    return ES.of(_options(folder), model, base)


def _check_fitness(folder: Path, steps: list[Step]) -> None:
    """Make sure that each step's fitness follows from its rewards; a fork's first steps may be shaped otherwise."""
    first = read_config(folder)[PROVENANCE].get(FORKED_AT, 0)
    for step in steps[first:]:
        if shape(_rewards(step), _options(folder).fitness).tolist() != step.fitness:
            raise CheckpointError(f"{folder}/ledger.jsonl: the fitness of step {step.step} does not follow its rewards")


def _rewards(step: Step) -> Tensor:
    """Return a recorded step's rewards (N,P) float64, NaN where they are missing."""
    rows = [[math.nan if reward is None else reward for reward in row] for row in unpacked(step.rewards)]
    return torch.tensor(rows, dtype=torch.float64)


def _check_snapshot(folder: Path, number: int, step: Step) -> None:
    found = checksum(read_snapshot(folder, number).params)
    if found != step.checksum:
        raise CheckpointError(
            f"the snapshot of step {number} has weights {found}, but the ledger says {step.checksum}; remove it"
        )


def _write_fork(folder: Path, target: Path, steps: list[Step], es: ES) -> None:
    values = read_config(folder)
    options = {**{name: value for name, value in values.items() if name != PROVENANCE}, "run": str(target)}
    made_with = {**values[PROVENANCE], "forked_from": str(folder.resolve()), FORKED_AT: len(steps)}
    with files.writing(target):
        (target / "snapshots").mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            past = [row for row in files.read_sound_lines(folder / name) if files.is_count(row.get("step"))]
            files.append(target / name, [row for row in past if row["step"] <= len(steps)])
        snapshot = Snapshot(len(steps), es.weights(), es.optimizer_state())
        files.replace(target / "config.yaml", config_text(options, made_with))
        files.append(target / "ledger.jsonl", chained(steps), flush=True)
        save_snapshot(target, snapshot, keep=int(values["keep"]))
