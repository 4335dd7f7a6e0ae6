"""Options as flags of a command line: what the commands are, and how their words are read."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NoReturn

from rwkv_es.config.file import RECIPES, say_renamed
from rwkv_es.config.groups import GROUPS
from rwkv_es.config.option import default_of, nearest
from rwkv_es.config.options import FORMER, OPTIONS, refuse_both_names
from rwkv_es.system.errors import ConfigError

VERBS = {
    "train": "fine-tune a checkpoint on a task's reward",
    "resume": "continue a run with its own options",
    "eval": "score a checkpoint's answers to a task's held-out problems",
    "generate": "answer one question with a checkpoint",
    "chat": "talk with a checkpoint",
    "doctor": "check a task, a model and a noise scale before training",
    "plan": "say what a training run takes before anything is loaded: memory, time, disk, and what to change",
    "export": "write a run's weights as an official-layout checkpoint",
    "replay": "rebuild a run's weights from its base and ledger, and verify them",
    "apply": "rebuild a run's weights from a base and a ledger of kilobytes",
    "fork": "start a new run from a step of another one",
    "reward": "check a reward: score reference answers and a model's, and show the calls",
    "watch": "show a run in the terminal while it trains",
    "report": "write a page about one run or several, at any time",
    "runs": "list the runs of a folder with their sizes and best scores",
    "clean": "remove snapshots, or whole runs, and nothing that a run has not made",
    "tasks": "list the built-in tasks, or show the prompt and reward of one",
}
_METAVARS = {int: "INT", float: "NUMBER", bool: "BOOL", dict: "NAME=X,..."}
SHOW_OPTIONS = (
    "data",
    "template",
    "system",
    "shots",
    "bos",
    "max_new_tokens",
    "reward",
    "reward_signature",
)  # of tasks show
CHECK_OPTIONS = (*SHOW_OPTIONS, "task", "model", "seed", "temperature", "device", "tokenizer")  # of reward check
MAIN_OPTION = {  # needs no flag
    **dict.fromkeys(("eval", "chat", "doctor", "plan"), "model"),
    **dict.fromkeys(("resume", "export", "replay", "fork"), "run"),
    "generate": "prompt",
}


FOLDER_VERBS = ("watch", "report", "runs", "clean", "apply")  # about run folders alone: they know no other options


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are ours: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Complain."""
        if message.endswith("expected one argument"):
            flag = message.split()[1].rstrip(":")
            message = f"{flag} needs a value (one that begins with -- is written {flag}=--...)"
        raise ConfigError(f"{message}; see {self.prog} --help")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line.

    Raises:
        ConfigError: a flag is unknown, or a word is one too many.
    """
    given, unknown = parser.parse_known_args(_with_values(_with_todays_names(_with_dashes(argv))))
    for word in unknown:
        if word.startswith("--"):
            name = word.partition("=")[0]
            flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
            raise ConfigError(f"unknown option {name} for {parser.prog.split()[-1]}; {nearest(name, flags)}")
        hint = "options have two dashes, and a text that begins with one stands behind --; " if word[0] == "-" else ""
        raise ConfigError(f"unexpected {word!r}; {hint}see {parser.prog} --help")
    return given


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """Let --eval_every, as in a file, mean --eval-every."""
    flags = argv[: argv.index("--")] if "--" in argv else argv
    parts = [word.partition("=") if word.startswith("--") else ("", "", word) for word in flags]
    return [name.replace("_", "-") + equals + value for name, equals, value in parts] + list(argv[len(flags) :])


def _with_todays_names(argv: Sequence[str]) -> list[str]:
    """Let the flags of earlier releases mean today's, and say so.

    Raises:
        ConfigError: an option is given under both.
    """
    flags = argv[: argv.index("--")] if "--" in argv else argv
    former = {"--" + old.replace("_", "-"): "--" + new.replace("_", "-") for old, new in FORMER.items()}
    parts = [word.partition("=") for word in flags]
    names = [name for name, _, _ in parts]
    for flag in dict.fromkeys(former.keys() & set(names)):
        refuse_both_names(flag, former[flag], names)
        say_renamed(flag, former[flag])
    return [former.get(flag, flag) + equals + value for flag, equals, value in parts] + list(argv[len(flags) :])


def _with_values(argv: Sequence[str]) -> list[str]:
    """Tie values that begin with a dash (-1e3, -inf, -x) to their flags: no option of ours has one dash but -h."""
    flags = argv[: argv.index("--")] if "--" in argv else argv
    found: list[str] = []
    for word in flags:
        is_value = word[:1] == "-" != word[1:2] and word != "-h"
        if is_value and found and found[-1].startswith("--") and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found + list(argv[len(flags) :])


def verb_parser(verb: str) -> Parser:
    """Return the parser of a command's options; what is not given is not in its result."""
    parser = Parser(
        prog=f"rwkv-es {verb}",
        usage=f"rwkv-es {verb} {f'[{MAIN_OPTION[verb].upper()}] ' if verb in MAIN_OPTION else ''}[options]",
        description=VERBS[verb][0].upper() + VERBS[verb][1:] + ".",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=32, width=112),
    )
    if verb in MAIN_OPTION:
        name = MAIN_OPTION[verb]
        parser.add_argument("main_value", nargs="?", metavar=name.upper(), help=f"the same as --{name}")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"YAML or TOML file of options, a run's folder, or a recipe: {', '.join(RECIPES)}; flags win over it",
    )
    if verb == "train":
        text = "print the options and the plan, check that all they name is there, and stop"
        parser.add_argument("--dry-run", action="store_true", help=text)
    for group in GROUPS:
        shown = [f for f in fields(group) if f.name in OPTIONS[verb]]
        section = parser.add_argument_group((group.__doc__ or "").rstrip(".")) if shown else parser
        for f in shown:
            section.add_argument("--" + f.name.replace("_", "-"), dest=f.name, **argument(f))
    return parser


def folder_parser(verb: str) -> Parser:
    """Return the parser of a command about run folders."""
    parser = Parser(
        prog=f"rwkv-es {verb}", description=VERBS[verb][0].upper() + VERBS[verb][1:] + ".", allow_abbrev=False
    )
    if verb == "runs":
        parser.add_argument("folder", nargs="?", default="runs", help="where to look (default: runs)")
        return parser
    if verb == "apply":
        parser.add_argument("base", metavar="BASE", help="the checkpoint that the run began with")
        parser.add_argument("ledger", metavar="LEDGER", help="a folder with config.yaml and ledger.jsonl of the run")
        parser.add_argument("--out", required=True, metavar="FILE", help="the weights, as export writes them")
        parser.add_argument("--step", type=int, default=-1, help="steps to take (default: to the best, else all)")
        return parser
    parser.add_argument("run", nargs=None if verb == "watch" else "+", metavar="RUN", help="folder of a run")
    if verb == "report":
        text = "the page (default: report.html in the run's folder; for several runs in this one)"
        parser.add_argument("--out", metavar="FILE", help=text)
    if verb == "clean":
        parser.add_argument("--all", action="store_true", help="the whole run, not only snapshots besides the best")
        parser.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def task_parser(verb: str, options: Sequence[str], **positional: Any) -> Parser:
    """Return the parser of a command that has a few options and words of its own before them."""
    parser = Parser(
        prog=f"rwkv-es {verb}", description=VERBS[verb][0].upper() + VERBS[verb][1:] + ".", allow_abbrev=False
    )
    for name, settings in positional.items():
        parser.add_argument(name, nargs="?", **settings)
    for f in (f for group in GROUPS for f in fields(group) if f.name in options):
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, dest=f.name, **argument(f), default=argparse.SUPPRESS)
    return parser


def argument(f: Any) -> dict[str, Any]:
    """Return argparse's view of an option; values stay strings, `config.build` converts and checks them."""
    default = default_of(f)
    text = f.metadata["help"].replace("%", "%%")
    if isinstance(default, dict):
        shown = ",".join(f"{name}={multiplier:g}" for name, multiplier in default.items())
    else:
        shown = str(default).lower() if isinstance(default, bool) else str(default)
    argument: dict[str, Any] = {
        "help": f"{text} (default: {shown})" if shown else text,
        "metavar": "|".join(f.metadata["choices"]) or _METAVARS.get(type(default), "TEXT"),
    }
    if isinstance(default, bool):
        argument.update(nargs="?", const="true")
    return argument
