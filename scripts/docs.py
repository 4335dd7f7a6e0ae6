"""Write the pages of the documentation that follow from the code: options, metrics, recipes.

python scripts/docs.py            write them
python scripts/docs.py --check    say which are not what the code says
"""

import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from rwkv_es.config.flags import FOLDER_VERBS, MAIN_OPTION, VERBS
from rwkv_es.config.groups import GROUPS
from rwkv_es.config.option import default_of
from rwkv_es.config.options import OPTIONS, Config
from rwkv_es.measure.glossary import METRICS
from rwkv_es.planning.plan import make_plan

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTE = "<!-- made by scripts/docs.py -->\n\n"
SIZES = ("0.1b", "0.4b", "1.5b", "2.9b", "7.2b", "13.3b")
CARDS = ("1xrtx4090-24", "1xl40s-48", "1xh100-80", "1xh200-141", "8xh100-80")
SIGMA = {"0.1b": 2e-3, "0.4b": 1.5e-3, "1.5b": 1e-3, "2.9b": 8e-4, "7.2b": 7e-4, "13.3b": 5e-4}
RESUME = {"free": "may change", "fork": "in a fork", "same": "never changes"}


ABOUT_RECIPES = """For answers of up to 512 tokens after prompts of 128, 8 of them a step. Members, answers in flight,
memory of a device and seconds are what `rwkv-es plan` predicts from data sheets; nothing was measured on a GPU yet.
Sigma and lr are a start: `rwkv-es doctor` looks for the scale, the step's line says how far a step moves.
"""
IN_8_BITS = (" --quantize int8 --state-dtype fp16", {"quantize": "int8", "state_dtype": "fp16"})
WAYS = (("", {}), (" --state-dtype fp16", {"state_dtype": "fp16"}), IN_8_BITS)


def main(argv: list[str]) -> int:
    """Write or check the pages. Returns the exit code."""
    pages = {"options.md": options(), "metrics.md": metrics(), "recipes.md": recipes()}
    stale = [name for name, text in pages.items() if not (DOCS / name).exists() or (DOCS / name).read_text() != text]
    if "--check" in argv:
        print(f"not what the code says: {', '.join(stale)}; run python scripts/docs.py" if stale else "all is current")
        return 1 if stale else 0
    for name in stale:
        (DOCS / name).write_text(pages[name], encoding="utf-8")
    return 0


def options() -> str:
    """Return the page of all commands and options."""
    head = "Each option is a flag and, with `_` for `-`, a key of a YAML or TOML file (`--config`); flags win.\n"
    lines = [NOTE + "# Options\n", head, "## Commands\n", "| command | |", "|---|---|"]
    lines += [f"| `rwkv-es {verb}{_argument(verb)}` | {text} |" for verb, text in VERBS.items()]
    for group in GROUPS:
        lines += ["", f"## {(group.__doc__ or '').rstrip('.')}\n", "| option | default | |", "|---|---|---|"]
        lines += [_option(f) for f in fields(group)]
    return "\n".join(lines) + "\n"


def _argument(verb: str) -> str:
    if verb in FOLDER_VERBS:
        return {"watch": " RUN", "runs": " [FOLDER]", "apply": " BASE LEDGER"}.get(verb, " RUN [RUN ...]")
    return {"tasks": " [show TASK]", "reward": " check FILE:FUNCTION"}.get(
        verb, f" {MAIN_OPTION.get(verb, '')}".upper().rstrip()
    )


def _option(f) -> str:
    default, known = default_of(f), f.metadata
    shown = ",".join(f"{k}={v:g}" for k, v in default.items()) if isinstance(default, dict) else str(default)
    verbs = [verb for verb in OPTIONS if f.name in OPTIONS[verb] and verb not in ("resume", "plan")] or ["plan"]
    choices = f" One of {', '.join(known['choices'])}." if known["choices"] else ""
    resume = f" When a run continues: {RESUME[known['on_resume']]}." if "train" in verbs else ""
    text = known["help"].replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    cells = (f"`--{f.name.replace('_', '-')}`", f"`{shown}`" if shown else "", f"{text}.{choices}")
    return f"| {' | '.join(cells)} *{', '.join(verbs)}.*{resume} |"


def metrics() -> str:
    """Return the page of all metrics."""
    lines = [NOTE + "# Metrics\n"]
    lines += [
        "Every name of `metrics.jsonl`, of which the step's line shows some. Trackers get them as `group/name`.\n"
    ]
    lines += ["| name | group | unit | what it is | when to worry |", "|---|---|---|---|---|"]
    for known in METRICS:
        lines.append(f"| `{known.name}` | {known.group} | {known.unit} | {known.meaning} | {known.worry} |")
    return "\n".join(lines) + "\n"


def recipes() -> str:
    """Return the page of recipes: what each model does on each card."""
    lines = [NOTE + "# Recipes\n"]
    lines += [
        "For answers of up to 512 tokens after prompts of 128, 8 of them a step. Members, generations in flight and"
    ]
    lines += [
        "seconds are what `rwkv-es plan` predicts from data sheets; none has been measured on a GPU yet. An empty"
    ]
    lines += ["line: it does not fit so. Sigma is a start; `rwkv-es doctor` looks for a better one.\n"]
    lines += ["| model | devices | flags | most in flight | memory | seconds a step |", "|---|---|---|---|---|---|"]
    lines += [line for size in SIZES for card in CARDS for line in recipe(size, card)]
    lines += ["", "The plan of any line, for example:\n", "```bash"]
    lines += [f"rwkv-es plan 1.5b --gpus {CARDS[0]} {flags('1.5b', 256, '')}", "```"]
    return "\n".join(lines) + "\n"


def flags(size: str, population: int, more: str) -> str:
    """Return the flags of a recipe."""
    scale = f"--sigma {SIGMA[size]:g} --lr {SIGMA[size]:g}"
    return f"--population {population} --prompts 8 --max-new-tokens 512 {scale}{more}"


def recipe(size: str, card: str) -> Iterator[str]:
    """Yield the line of a model on a card: the first way in which it fits, with members enough to fill it."""
    for more, changes in WAYS:
        wanted = Config(model=size, gpus=card, population=256, max_new_tokens=512, **changes)
        made = make_plan(wanted)
        population = max(64, min(4096, 1 << (made.most * made.num_devices // 8).bit_length()))
        made = make_plan(replace(wanted, population=population))
        if made.most >= 64 and made.fits and made.times is not None:
            most, seconds = made.most * made.num_devices, made.times.generate_s + made.times.update_s
            numbers = f"{most:,} | {made.memory.peak / 1e9:.0f} GB | {seconds:.0f}"
            yield f"| {size} | {card} | `{flags(size, population, more)}` | {numbers} |"
            return
    yield f"| {size} | {card} | does not fit | | | |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
