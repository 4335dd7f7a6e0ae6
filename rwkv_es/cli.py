"""The command line: parse the options of a verb, then import and run it."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rwkv_es import __version__
from rwkv_es.config.combinations import idle_options
from rwkv_es.config.file import is_run_folder, load_file, recipe_for, run_folder
from rwkv_es.config.flags import (
    CHECK_OPTIONS,
    FOLDER_VERBS,
    MAIN_OPTION,
    SHOW_OPTIONS,
    VERBS,
    folder_parser,
    parse,
    task_parser,
    verb_parser,
)
from rwkv_es.config.objective import objective_of
from rwkv_es.config.option import at_home, convert, nearest
from rwkv_es.config.options import FIELDS, OPTIONS, Config, build
from rwkv_es.model.batch import choose_blas_mode
from rwkv_es.run.launcher import LOST, said_once, under_launcher
from rwkv_es.system.errors import ClusterError, ConfigError, RwkvEsError, Terminated, in_plain_words
from rwkv_es.system.streams import lost_output, make_unfailing, waiting
from rwkv_es.system.texts import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0; 2: there is something to mend; 75: a process was lost; 130, 143."""
    argv = list(sys.argv[1:] if argv is None else argv)
    make_unfailing()
    choose_blas_mode()
    try:
        with under_launcher():  # from the first moment on, before torch is loaded
            _say_what_fails(argv)
    except RwkvEsError as error:
        return LOST if isinstance(error, ClusterError) else 2
    except KeyboardInterrupt as error:
        return 143 if isinstance(error, Terminated) else 130
    return 0


def _say_what_fails(argv: Sequence[str]) -> None:
    """Run a command line; say in one line why it ended before it was done."""
    try:
        _run_all(argv)
    except RwkvEsError as error:
        _complain(str(error))
        raise
    except KeyboardInterrupt:
        hint = "; the same command, without --resume never, continues after the last finished step"
        if os.environ.get("RANK", "0") == "0":
            print(f"\nrwkv-es: stopped{hint if argv[:1] in (['train'], ['resume']) else ''}", file=sys.stderr)
        raise
    except Exception as error:
        if not (words := in_plain_words(error)):
            raise
        _complain(words)
        raise RwkvEsError(words) from None


def _complain(text: str) -> None:
    print(f"rwkv-es: {printable(' '.join(text.split()))}", file=sys.stderr)


def _run_all(argv: Sequence[str]) -> None:
    with said_once():
        training = _dispatch(argv)
    if training is not None:
        _train(training)  # in it processes meet, and know which one speaks
    if reason := lost_output():
        text = f"standard output could not be written ({reason}), so a part of it is lost"
        if training is None and argv[0] not in ("export", "fork"):
            raise ConfigError(f"{text}; write elsewhere")
        _complain(text)


def _dispatch(argv: Sequence[str]) -> Config | None:
    """Run a command. Returns the options of a training, which is yet to be run."""
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if verb in ("--help", "-h"):
        print(_overview())
    elif verb == "--version":
        print(f"rwkv-es {__version__}")
    elif verb == "tasks":
        _tasks(rest)
    elif verb == "reward":
        _reward(rest)
    elif verb in FOLDER_VERBS:
        from rwkv_es.verbs.folders import about_folders

        about_folders(verb, parse(folder_parser(verb), rest))
    elif verb in OPTIONS:
        return _run(verb, rest)
    else:
        raise ConfigError(f"there is no command {verb!r}; {nearest(verb, VERBS)}")
    return None


def _overview() -> str:
    lines = "\n".join(f"  {verb:<10}{text}" for verb, text in VERBS.items())
    return (
        "usage: rwkv-es COMMAND [options]\n\n"
        "Fine-tune RWKV-7 language models on a reward with evolution strategies: inference only.\n\n"
        f"{lines}\n\n"
        "rwkv-es COMMAND --help lists a command's options; rwkv-es --version names the version."
    )


def _run(verb: str, argv: Sequence[str]) -> Config | None:
    given = vars(parse(verb_parser(verb), argv))
    is_dry_run = given.pop("dry_run", False)
    file = given.pop("config", "")
    main_value = given.pop("main_value", None)
    if main_value is not None:
        name = MAIN_OPTION[verb]
        if name in given:
            raise ConfigError(f"{name} is given twice: {main_value!r} and {given[name]!r}; leave one out")
        given[name] = main_value
    given = {name: at_home(FIELDS[name], value) for name, value in given.items()}
    recipe = recipe_for(given) if verb == "train" and not file else ""
    file = file or recipe
    config = build(_with_files(verb, file, given), verb)
    if verb in MAIN_OPTION and not getattr(config, MAIN_OPTION[verb]):
        raise ConfigError(f"{verb} needs a {MAIN_OPTION[verb]}: rwkv-es {verb} {MAIN_OPTION[verb].upper()}")
    _mind_idle(config, verb, given, is_old=_is_of_run(verb, file, config))
    if is_dry_run:
        from rwkv_es.verbs.plan import dry_run

        dry_run(config)
        return None
    if recipe:
        _note(f"no model is named, so the embedded one is trained by its recipe: --config {recipe}")
    if verb in ("train", "resume"):
        return config
    with waiting("starting"):
        run = _verb(verb)
    _use_threads(config)
    run(config)
    return None


def _mind_idle(config: Config, verb: str, given: dict[str, Any], is_old: bool) -> None:
    """Refuse options that do nothing; say it of those that nobody has just written, and where nothing is lost."""
    for idle in idle_options(config, verb, given):
        is_written = idle.name in given or (verb == "train" and not is_old)
        if is_written and not idle.is_harmless:
            raise ConfigError(idle.text)
        is_of_interest = is_written or not config.text  # the file of a run or a recipe serves every command
        if is_of_interest:
            _note(idle.text)


def _note(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        _complain(f"note: {text}")


def _is_of_run(verb: str, file: str, config: Config) -> bool:
    """Say whether options come from a run that has begun, perhaps with an earlier release."""
    if verb != "train":
        return verb == "resume"
    return any(map(is_run_folder, (file, str(Path(file).parent) if file else "", str(run_folder(config)))))


def _with_files(verb: str, file: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options given, and those that stand in a file or in the run that is continued or asked.

    A training run's file serves every command: what a command does not know of it is left out.
    """
    if verb == "resume":
        run = given.get("run", "")
        if not is_run_folder(run):
            raise ConfigError(f"{run or 'resume'!r} is not the folder of a run; name one: rwkv-es resume RUN")
        return {**load_file(run), **given}
    values = {**(load_file(file) if file else {}), **given}
    if any(is_run_folder(str(convert(FIELDS[name], values.get(name, "")))) for name in ("model", "base")):
        from rwkv_es.run.weights import with_weights

        values = with_weights(values, verb)
    if verb == "train":
        return values
    if verb == "eval" and "objective" not in given and not objective_of(str(values.get("objective", "mean"))).logprob:
        values.pop("objective", None)  # whatever a run made of its samples, all of it is shown
    known = {name for names in OPTIONS.values() for name in names}
    return {name: value for name, value in values.items() if name in OPTIONS[verb] or name not in known}


def _verb(verb: str) -> Callable[[Config], Any]:
    """Import a verb's function: torch comes in here and not before."""
    if verb == "export":
        from rwkv_es.verbs.export import export

        return export
    if verb in ("replay", "fork"):
        from rwkv_es.verbs.history import fork, replay

        return replay if verb == "replay" else fork
    if verb == "chat":
        from rwkv_es.verbs.chat import chat

        return chat
    if verb == "plan":
        from rwkv_es.verbs.plan import plan

        return plan
    if verb == "doctor":
        from rwkv_es.verbs.doctor import doctor

        return doctor
    from rwkv_es.verbs.evaluate import evaluate, generate

    return evaluate if verb == "eval" else generate


def _use_threads(config: Config) -> None:
    """Give torch as many threads as the options say. The library itself leaves them alone."""
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)


def _train(config: Config) -> None:
    """Train; leave the best weights, exported, and a report in the run folder."""
    with waiting("starting"):  # torch takes seconds
        from rwkv_es.measure.page import write_report
        from rwkv_es.verbs.export import export
        from rwkv_es.verbs.train import train

    _use_threads(config)
    folder = train(config)
    if folder is None:  # rank 0 writes for all
        return
    if config.steps:
        export(Config(run=str(folder)))
    print(f"wrote {write_report(folder)}")


def _tasks(argv: Sequence[str]) -> None:
    words = {
        "show": {"choices": ["show"], "help": "show a task's first problem"},
        "name": {"metavar": "TASK", "help": "built-in task, a folder or .py file, or a mixture"},
    }
    given = vars(parse(task_parser("tasks", SHOW_OPTIONS, **words), argv))
    show, name = given.pop("show"), given.pop("name")
    if not show:
        if given:
            raise ConfigError(f"{next(iter(given))} does nothing in a list of all tasks; try rwkv-es tasks show NAME")
        from rwkv_es.verbs.tasks import print_tasks

        print_tasks()
    elif not name:
        raise ConfigError("tasks show needs a task: rwkv-es tasks show countdown_mini")
    else:
        from rwkv_es.verbs.tasks import show_task

        show_task(build({**given, "task": name}))


def _reward(argv: Sequence[str]) -> None:
    words = {
        "check": {"choices": ["check"], "help": "score answers to a few problems and show what is called"},
        "function": {"metavar": "FILE:FUNCTION", "help": "the reward, as --reward names it"},
    }
    given = vars(parse(task_parser("reward", CHECK_OPTIONS, **words), argv))
    is_check, function = given.pop("check"), given.pop("function")
    if not (is_check and function):
        raise ConfigError("reward needs a function: rwkv-es reward check rewards.py:score --data puzzles.jsonl")
    from rwkv_es.reward.calls import check_reward

    config = build({**({"task": "jsonl"} if "data" in given else {}), **given, "reward": function})
    if "model" not in given:
        check_reward(config, None)
        return
    from rwkv_es.verbs.evaluate import texts_by_problem

    check_reward(config, partial(texts_by_problem, config))
