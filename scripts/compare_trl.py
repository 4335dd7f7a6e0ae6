"""Check our GRPO from outside: TRL's GRPOTrainer on the same model, problems, reward and settings.

    pip install -e '.[compare,outside,hf,tasks]'
    python scripts/compare_trl.py --task arithmetic_mini --answers 16384 --out runs/trl

TRL trains the model as rwkv7-hf converts and computes it, with torch's autograd; its own loop samples, scores and
updates. What rwkv7-hf does for one text and token after the other, `recurrence` does for all texts at once, or a run
would take hours. Both methods have the same number of answers and are judged by our engine. Records go to
records.jsonl, in the form of compare.py's; a start with the same folder goes on from there.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import rwkv7_hf.modeling_rwkv7 as hf
import torch
import torch.nn.functional as F
from compare import grpo
from compare.race import Entry, accuracy, draw, run
from compare.records import Record, is_done, read_records
from compare.world import World, open_world
from datasets import Dataset
from rwkv7_sequence import CHUNK, wkv_chunked
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from rwkv_es.engine.stops import cut
from rwkv_es.model.layout import Params
from rwkv_es.pretrained.exported import export_directory
from rwkv_es.pretrained.header import resolve
from rwkv_es.pretrained.huggingface import official
from rwkv_es.task import Problem

METHODS = ("grpo", "trl")


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are not there yet, then the table."""
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    hf.rwkv7_recurrent = recurrence
    world = open_world(options.model, options.task)
    for seed in range(options.seeds):
        for method in METHODS:
            make(world, Entry(method, options.settings, seed, "generations", options.answers), options)
    print(table(read_records(options.out), options))
    return 0


def make(world: World, entry: Entry, options: argparse.Namespace) -> None:
    """Make one run, unless its records are there; append them."""
    head = {"task": options.task, "phase": "final", **entry._asdict()}
    if is_done(read_records(options.out), head):
        return
    problems = world.test[: options.judge]
    if entry.method == "grpo":
        records = list(run(world, entry, problems))
    else:
        records = train(world, entry, problems, options.model)
    with (options.out / "records.jsonl").open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({**head, **record, "is_last": record is records[-1]}) + "\n")
    print(f"{entry.method} seed {entry.seed}:", *(f"{record['accuracy']:.1%}" for record in records), flush=True)


def table(records: Sequence[Record], options: argparse.Namespace) -> str:
    """Return the accuracy of both, mean ± deviation over the seeds, after so many answers."""
    lines = ["| answers | GRPO of ours | TRL's |", "|---|---|---|"]
    wanted = {"task": options.task, "settings": options.settings, "amount": options.answers}
    own = [record for record in records if all(record[key] == value for key, value in wanted.items())]
    for count in sorted({record["generations"] for record in own}):
        cells = []
        for method in METHODS:
            found = [r["accuracy"] for r in own if (r["method"], r["generations"]) == (method, count)]
            cells.append(f"{fmean(found):.1%} ± {pstdev(found):.1%} of {len(found)}" if found else "–")
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the warm start")
    parser.add_argument("--task", default="arithmetic_mini", help="the task")
    parser.add_argument("--answers", default=16384.0, type=float, help="answers of a run")
    parser.add_argument("--settings", default={"lr": 1e-3, "epochs": 1, "prompts": 32}, type=json.loads, help="as JSON")
    parser.add_argument("--seeds", default=3, type=int, help="runs of each method")
    parser.add_argument("--judge", default=150, type=int, help="held-out problems that judge")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    return parser.parse_args(argv)


def recurrence(*given: Tensor) -> tuple[Tensor, Tensor]:
    """Compute rwkv7_hf's `rwkv7_recurrent` for all rows at once: returns outputs (B,T,H,64) and the state.

    given: r, w, k, v, a, b (B,T,H,64), state (B,H,64,64), mask (B,T) bool or None. Where gradients are wanted, a text
    is read from its start in chunks, and no state is returned: training keeps none.
    """
    r, w, k, v, a, b, state, mask = given
    if torch.is_grad_enabled():
        return _chunked((r, w, k, v, a, b), mask), torch.full_like(state, torch.nan)
    outputs, state = [], state.mT
    for t in range(r.shape[1]):
        removed = (state @ a[:, t, :, :, None]) @ b[:, t, :, None]
        after = state * w[:, t, :, None] + removed + v[:, t, :, :, None] @ k[:, t, :, None]
        output = (after @ r[:, t, :, :, None]).squeeze(-1)
        if mask is not None:
            is_read = mask[:, t, None, None]
            after, output = torch.where(is_read[..., None], after, state), output * is_read
        state = after
        outputs.append(output)
    return torch.stack(outputs, 1), state.mT


def _chunked(given: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Return the outputs by pretrain_tiny.py's form; a token that is not read decays nothing and adds nothing."""
    rows, length = given[0].shape[:2]
    is_read = torch.ones(rows, length, dtype=torch.bool) if mask is None else mask

    def padded(x: Tensor) -> Tensor:  # (B,T,H,64) -> (B,H,T',64), T' a multiple of the chunk
        read = x.masked_fill(~is_read[..., None, None], 0.0)
        return F.pad(read, (0, 0, 0, 0, 0, -length % CHUNK)).transpose(1, 2)

    r, log_w, k, v, a, b = (padded(x) for x in (given[0], given[1].log(), *given[2:]))
    keep = torch.ones(rows, log_w.shape[2] // CHUNK)
    return wkv_chunked(r, log_w, k, v, kk=-a, b=b, keep=keep).transpose(1, 2)[:, :length]


class Policy(hf.RWKV7ForCausalLM):
    """Generates with its state: rwkv7-hf keeps none in training mode, which changes nothing else about it."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as it does outside training."""
        self.eval()
        try:
            return super().generate(*args, **kwargs)
        finally:
            self.train()


class Judge(TrainerCallback):
    """Keeps a record of the accuracy whenever so many more answers have been learned from."""

    def __init__(self, judged: Callable[[], float], answers_per_step: float, interval: float) -> None:
        self.judged, self.answers_per_step, self.interval = judged, answers_per_step, interval
        self.records = [{"generations": 0, "accuracy": judged()}]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Judge the weights after a step."""
        answers = state.global_step * self.answers_per_step
        is_last = state.global_step == state.max_steps
        if is_last or (answers.is_integer() and answers >= self.records[-1]["generations"] + self.interval):
            self.records.append({"generations": int(answers), "accuracy": self.judged()})


def train(world: World, entry: Entry, problems: Sequence[Problem], base: str = "tiny") -> list[Record]:
    """Let TRL train; return the records."""
    settings = {**grpo.DEFAULTS, **entry.settings}
    count, samples, epochs = settings["prompts"], settings["samples"], settings["epochs"]
    num_steps = -(-int(entry.amount) // (count * samples))
    asked = [problem for step in range(num_steps) for problem in draw(world.train, count, entry.seed, step)]
    model, tokenizer = converted(world, base)
    judge = Judge(
        lambda: accuracy(world, {**world.model.params, **official_params(model)}, problems),
        count * samples / epochs,
        entry.amount / entry.points,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model,
            reward_funcs=reward_of(world, asked),
            args=config(world, settings, entry.seed, num_steps * epochs, folder),
            train_dataset=Dataset.from_dict(
                {"prompt": [problem.prompt for problem in asked], "place": list(range(len(asked)))}
            ),
            processing_class=tokenizer,
            callbacks=[judge],
        )
        trainer.train()
    return judge.records


def config(world: World, settings: Mapping[str, Any], seed: int, num_steps: int, folder: str) -> GRPOConfig:
    """Return TRL's settings: what compare/grpo.py does, with TRL's defaults for the rest."""
    return GRPOConfig(
        output_dir=folder,
        seed=seed,
        max_steps=num_steps,
        per_device_train_batch_size=settings["prompts"] * settings["samples"],
        num_generations=settings["samples"],
        num_iterations=settings["epochs"],
        steps_per_generation=1,
        max_completion_length=world.task.max_new_tokens,
        learning_rate=settings["lr"],
        lr_scheduler_type=settings.get("schedule", "constant"),
        epsilon=settings["clip"],
        loss_type=settings.get("loss", "grpo"),
        shuffle_dataset=False,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def converted(world: World, base: str) -> tuple[Policy, PreTrainedTokenizerFast]:
    """Return the base as `rwkv-es export --format hf` writes it, and its tokenizer; answers end where the task's do."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "base")
        export_directory(world.model.params, resolve(base), path)
        model = Policy.from_pretrained(path, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    ends = [world.tokenizer.end_id]
    for stop in world.task.stop:
        (token,) = world.tokenizer.encode(stop)  # TRL stops at tokens alone
        ends.append(token)
    model.generation_config.eos_token_id = ends
    return model, tokenizer


def official_params(model: Policy) -> Params:
    """Return its weights under the official names, in the official shapes."""
    found = {}
    for name, tensor in model.state_dict().items():
        place = official(name)
        found[place.name] = (tensor.mT if place.is_transposed else tensor).contiguous()
        found[place.name] = found[place.name].reshape(place.shape(tuple(tensor.shape)))
    return found


def reward_of(world: World, asked: Sequence[Problem]) -> Callable[..., list[float]]:
    """Return the task's reward in TRL's form."""

    def reward(completion_ids: Sequence[list[int]], place: Sequence[int], **_: Any) -> list[float]:
        texts = (cut(world.tokenizer.decode(ids), world.task.stop, world.task.stop_included) for ids in completion_ids)
        return [float(world.task.reward(asked[each], text)) for each, text in zip(place, texts)]

    return reward


if __name__ == "__main__":
    raise SystemExit(main())
