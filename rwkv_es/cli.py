"""The command line: parse the options of a verb, then import and run it."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from rwkv_es import __version__
from rwkv_es.config import CHOICES, OPTIONS, Config, build, load_file, nearest, run_folder, to_dict
from rwkv_es.errors import ConfigError, RwkvEsError

VERBS = {
    "train": "fine-tune a checkpoint on a task's reward",
    "eval": "score a checkpoint's answers to a task's held-out problems",
    "generate": "let a checkpoint answer one question",
    "export": "write a run's weights as an official-layout checkpoint",
    "tasks": "list the built-in tasks, or show what one sends and pays",
}
MAIN_OPTION = {"eval": "model", "generate": "prompt", "export": "run"}  # may also be given without its flag


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 2 where the user has something to mend, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(argv)
    except RwkvEsError as error:
        print(f"rwkv-es: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; the same command, without --resume never, continues after the last finished step"
        print(f"\nrwkv-es: stopped{hint if argv[:1] == ['train'] else ''}", file=sys.stderr)
        return 130
    return 0


def _dispatch(argv: Sequence[str]) -> None:
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if verb in ("--help", "-h"):
        print(_overview())
    elif verb == "--version":
        print(f"rwkv-es {__version__}")
    elif verb == "tasks":
        _tasks(rest)
    elif verb in OPTIONS:
        _run(verb, rest)
    else:
        raise ConfigError(f"there is no command {verb!r}; {nearest(verb, VERBS)}")


def _overview() -> str:
    lines = [f"  {verb:<10}{text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            "usage: rwkv-es COMMAND [options]",
            "",
            "Fine-tune RWKV-7 language models on a reward with evolution strategies: inference only.",
            "",
            *lines,
            "",
            "rwkv-es COMMAND --help lists a command's options; rwkv-es --version names the version.",
        ]
    )


def _run(verb: str, argv: Sequence[str]) -> None:
    given = vars(_parse(_verb_parser(verb), argv))
    is_dry_run = given.pop("dry_run", False)
    file = given.pop("config", "")
    main_value = given.pop("main_value", None)
    if main_value is not None:
        name = MAIN_OPTION[verb]
        if name in given:
            raise ConfigError(f"{name} is given twice: {main_value!r} and {given[name]!r}; leave one out")
        given[name] = main_value
    config = build({**(load_file(file) if file else {}), **given}, verb)
    if verb in MAIN_OPTION and not getattr(config, MAIN_OPTION[verb]):
        raise ConfigError(f"{verb} needs a {MAIN_OPTION[verb]}: rwkv-es {verb} {MAIN_OPTION[verb].upper()}")
    if is_dry_run:
        print(_resolved(config), end="")
    else:
        _verb(verb)(config)


def _verb(verb: str) -> Callable[[Config], Any]:
    """Import a verb's function: torch comes in here and not before."""
    if verb == "train":
        return _train
    if verb == "export":
        from rwkv_es.export import export

        return export
    from rwkv_es.evaluate import evaluate, generate

    return evaluate if verb == "eval" else generate


def _train(config: Config) -> None:
    """Train; leave the best weights, exported, and a report in the run folder."""
    from rwkv_es.export import export
    from rwkv_es.report import write_report
    from rwkv_es.train import train

    folder = train(config)
    if config.steps:
        export(Config(run=str(folder)))
    print(f"wrote {write_report(folder)}")


def _resolved(config: Config) -> str:
    import yaml

    return yaml.safe_dump({**to_dict(config), "run": str(run_folder(config))}, sort_keys=False, allow_unicode=True)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are ours: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    given, unknown = parser.parse_known_args(_with_dashes(argv))
    for word in unknown:
        if word.startswith("-"):
            name = word.partition("=")[0]
            flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
            raise ConfigError(f"unknown option {name} for {parser.prog.split()[-1]}; {nearest(name, flags)}")
        raise ConfigError(f"unexpected {word!r}; see {parser.prog} --help")
    return given


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """Let --eval_every, as in a file, mean --eval-every."""
    flags = argv[: argv.index("--")] if "--" in argv else argv
    parts = [word.partition("=") if word.startswith("--") else ("", "", word) for word in flags]
    return [name.replace("_", "-") + equals + value for name, equals, value in parts] + list(argv[len(flags) :])


def _verb_parser(verb: str) -> _Parser:
    parser = _Parser(
        prog=f"rwkv-es {verb}",
        description=VERBS[verb][0].upper() + VERBS[verb][1:] + ".",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    if verb in MAIN_OPTION:
        name = MAIN_OPTION[verb]
        parser.add_argument("main_value", nargs="?", metavar=name.upper(), help=f"the same as --{name}")
    parser.add_argument("--config", metavar="FILE", help="YAML or TOML file of these options; flags win over it")
    if verb == "train":
        parser.add_argument("--dry-run", action="store_true", help="print the resolved options and stop")
    for f in fields(Config):
        if f.name in OPTIONS[verb]:
            parser.add_argument("--" + f.name.replace("_", "-"), dest=f.name, **_argument(f))
    return parser


def _argument(f: Any) -> dict[str, Any]:
    """Return argparse's view of an option; values stay strings, `config.build` converts and checks them."""
    default = f.default if f.default is not MISSING else f.default_factory()
    text = f.metadata["help"].replace("%", "%%")
    if isinstance(default, dict):
        shown = ",".join(f"{name}={multiplier:g}" for name, multiplier in default.items())
    else:
        shown = str(default).lower() if isinstance(default, bool) else str(default)
    if f.name in CHOICES and not all(choice in text for choice in CHOICES[f.name]):
        text += f": {', '.join(CHOICES[f.name])}"
    argument: dict[str, Any] = {
        "help": f"{text} (default: {shown})" if shown else text,
        "metavar": {int: "INT", float: "NUMBER", bool: "BOOL", dict: "NAME=X,..."}.get(type(default), "TEXT"),
    }
    if isinstance(default, bool):
        argument.update(nargs="?", const="true")
    return argument


def _tasks(argv: Sequence[str]) -> None:
    parser = _Parser(prog="rwkv-es tasks", description=VERBS["tasks"], allow_abbrev=False)
    parser.add_argument("show", nargs="?", choices=["show"], help="show a task's first problem")
    parser.add_argument("name", nargs="?", metavar="TASK", help="built-in task, or path to a folder or .py file")
    parser.add_argument("--data", default="", metavar="TEXT", help="the task's data")
    parser.add_argument("--template", default="auto", metavar="TEXT", help="prompt template (default: the task's own)")
    given = _parse(parser, argv)
    if not given.show:
        from rwkv_es.task import list_tasks

        for name, text in list_tasks().items():
            print(f"{name:<16}{text}")
    elif not given.name:
        raise ConfigError("tasks show needs a task: rwkv-es tasks show countdown_mini")
    else:
        _show_task(given.name, given.data, given.template)


def _show_task(name: str, data: str, template: str) -> None:
    from rwkv_es.task import load_task, render

    task = load_task(name, data)
    problem = task.problems("train")[0]
    print(render(task.template if template == "auto" else template, problem.prompt))
    print(f"--- right answer (scores {task.reward(problem, problem.answer)}):")
    print(problem.answer)
