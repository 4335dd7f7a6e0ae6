"""`rwkv-es reward check`: what a reward is called with and pays, before any training."""

from collections.abc import Iterator

from rwkv_es.config.options import Config
from rwkv_es.reward.adapters import Answer, parse_rewards
from rwkv_es.reward.calls import form_in_words, score_shown
from rwkv_es.session import answer, open_session
from rwkv_es.task.mixture import load_tasks
from rwkv_es.task.task import Problem, Task

NUM_PROBLEMS, NUM_SAMPLES = 3, 2


def check_reward(config: Config, has_model: bool) -> None:
    """Print for each reward and a few problems: the call, and what the reference, a wrong answer and none earn.

    has_model: let the model that the options name answer too.

    Raises:
        RwkvEsError: task, data, reward or model cannot be loaded.
    """
    task = load_tasks(config.task, config.data)
    problems = list(task.problems("train")[:NUM_PROBLEMS])
    sampled = _sampled(config, task, problems) if has_model else {}
    for part in parse_rewards(config.reward):
        print(form_in_words(part.reference, config.reward_signature))
        for place, problem in enumerate(problems):
            print(f"\n  problem {place + 1}: {problem.prompt[:200]!r}")
            for title, texts in _tried(problems, place, sampled.get(place, [])):
                answers = [Answer(problem, text, []) for text in texts]
                print(f"  {title}:")
                print("\n".join(score_shown(task, part.reference, config.reward_signature, answers)))
    if not has_model:
        print("\nwith --model a model answers too")


def _tried(problems: list[Problem], place: int, sampled: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield what is scored together: the reference with others beside it, and what a model says."""
    others = [other.answer for other in problems if other.answer != problems[place].answer][:1]
    if problems[place].answer:
        yield "the reference answer", [problems[place].answer]
    yield "another problem's answer, and none", [*others, ""]
    if sampled:
        yield "the model's answers", sampled


def _sampled(config: Config, task: Task, problems: list[Problem]) -> dict[int, list[str]]:
    """Return a model's answers by the places of the problems."""
    session = open_session(config, task)
    samples = NUM_SAMPLES if config.temperature else 1
    texts = answer(session, problems, samples=samples).texts
    return {place: texts[samples * place : samples * (place + 1)] for place in range(len(problems))}
