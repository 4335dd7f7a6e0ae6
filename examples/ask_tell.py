"""Tune the embedded model with a loop of your own: python examples/ask_tell.py (15 seconds on two cores)."""

from rwkv_es import ES, generate, load_model, load_task

task = load_task("countdown_mini")
held_out = task.problems("test")[:200]
model, tokenizer = load_model("tiny")
es = ES(model, sigma=3e-3, lr=2e-3, population=64, targets={"matrices": 1, "head.weight": 10})


def score(problems, texts):
    """Return the reward of each text."""
    return [task.reward(problem, text) for problem, text in zip(problems, texts)]


def accuracy():
    """Return the share of held-out problems that the model gets right."""
    texts = generate(model, tokenizer, [problem.prompt for problem in held_out], max_new_tokens=task.max_new)
    return sum(score(held_out, texts)) / len(held_out)


print(f"before: {accuracy():.0%} of {len(held_out)} held-out problems right")
for step in range(16):
    problems = task.problems("train")[8 * step : 8 * step + 8]
    prompts = [problem.prompt for problem in problems]
    texts = generate(model, tokenizer, prompts, es.ask(), max_new_tokens=task.max_new, slots=512)  # [member][problem]
    update = es.tell([score(problems, row) for row in texts])
    print(f"step {step + 1}: reward {update.reward_mean:.3f}, moved {update.step_rms_per_sigma:.2f} sigma")
print(f"after: {accuracy():.0%}")
