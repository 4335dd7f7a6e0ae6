"""A model card: what an export is made of and what it was measured to do."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from rwkv_es.config.option import default_of
from rwkv_es.config.options import FIELDS, PROVENANCE, model_name
from rwkv_es.measure.statistics import wilson
from rwkv_es.run.identity import read_config
from rwkv_es.run.ledger import read_metrics
from rwkv_es.system.hub import pushed
from rwkv_es.system.texts import text_of

_TEMPLATE = Path(__file__).with_name("card.md")


def publish(repo: str, run: Path, written: Sequence[Path], step: int) -> None:
    """Send an export of the weights after some steps to the hub, with its card; do nothing without a repository."""
    if repo:
        print(f"published {pushed(repo, written, card(run, step))}")


def card(run: Path, step: int) -> str:
    """Return the card of a run's weights: base, hash of the ledger, held-out accuracy with intervals, the command."""
    options, rows = read_config(run), [row for row in read_metrics(run) if "eval/accuracy" in row]
    made, ledger = options[PROVENANCE], hashlib.sha256((run / "ledger.jsonl").read_bytes()).hexdigest()
    told = {row["step"]: (row["eval/accuracy"], int(row["eval/problems"])) for row in rows if row["step"] in (0, step)}
    found = [(at, share, count, wilson(round(share * count), count)) for at, (share, count) in told.items()]
    scores = [f"| {at} | {share:.1%} | {low:.1%} to {high:.1%} | {n} |" for at, share, n, (low, high) in found]
    changed = {name: text_of(value) for name, value in options.items() if name in FIELDS and name != "run"}
    changed = {name: text for name, text in changed.items() if text != text_of(default_of(FIELDS[name]))}
    given = [f"--{name.replace('_', '-')} {quote(text.replace(', ', ','))}" for name, text in changed.items()]
    named = {"task": options["task"], "base": model_name(made["base"]), "ledger": ledger, "step": step, "made": made}
    command = " ".join(["rwkv-es train", *given])
    return _TEMPLATE.read_text(encoding="utf-8").format(**named, lines="\n".join(scores), command=command)
