"""Tune the embedded model with a loop of your own: python examples/ask_tell.py (10 seconds on two cores)."""

from rwkv_es import ES, generate, load_model, load_task

task = load_task("countdown_mini")
model, tokenizer = load_model("tiny")
targets = {"matrices": 1, "head.weight": 10}
es = ES(model, sigma=3e-3, lr=1e-2, population=64, targets=targets, steps=8, schedule="cosine")


def score(problems, texts):
    """Return the reward of each text."""
    return [task.reward(problem, text) for problem, text in zip(problems, texts)]


def answer(problems, members=None):
    """Return the model's texts, or with members a row of texts for each."""
    prompts = [problem.prompt for problem in problems]
    return generate(model, tokenizer, prompts, members, max_new_tokens=task.max_new_tokens, slots=512)


held_out = task.problems("test")[:200]
print(f"before: {sum(score(held_out, answer(held_out))) / 200:.0%} of 200 held-out problems right")
for step in range(8):
    problems = task.problems("train")[8 * step : 8 * step + 8]
    update = es.tell([score(problems, texts) for texts in answer(problems, es.ask())])
    print(f"step {step + 1}: reward {update.reward_mean:.3f}, moved {update.step_rms_per_sigma:.2f} sigma")
print(f"after: {sum(score(held_out, answer(held_out))) / 200:.0%}")
