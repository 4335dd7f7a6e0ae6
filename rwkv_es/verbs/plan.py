"""`rwkv-es plan`: will it fit, how long will it take, what to change; before anything is loaded."""

import yaml

from rwkv_es.config.file import run_folder
from rwkv_es.config.options import Config, to_dict
from rwkv_es.planning.plan import make_plan
from rwkv_es.planning.text import plan_lines
from rwkv_es.reward.adapters import load_scorer
from rwkv_es.task.mixture import load_tasks, refuse_too_few
from rwkv_es.task.prompts import Prompting, is_count, prompt_of
from rwkv_es.task.task import Problem


def plan(config: Config) -> None:
    """Print what a run with these options takes."""
    print("\n".join(plan_lines(make_plan(config))))


def dry_run(config: Config) -> None:
    """Print the options as YAML; check that all they name is there; print the plan for this machine as comments.

    Raises:
        RwkvEsError: the model, the task, its data or the reward cannot be read.
    """
    values = {**to_dict(config), "run": str(run_folder(config))}
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="", flush=True)
    made = make_plan(config, is_here=True)
    task = load_tasks(config.task, config.data, config.eval_sets)
    load_scorer(task, config.reward, config.reward_signature)
    problem, shots = Problem("", ""), "0" if is_count(config.shots) else config.shots
    if config.data:  # else the task may fetch its own
        refuse_too_few(task, config.prompts)
        problem, shots = task.problems("train")[0], config.shots
    prompt_of(task, problem, Prompting(config.template, config.system, shots))
    print("\n".join(f"# {line}" for line in plan_lines(made)))
