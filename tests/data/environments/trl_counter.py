"""An environment after TRL's documentation of `environment_factory`: a counter that tools move."""


class CounterEnv:
    def __init__(self):
        self._counter = 0

    def reset(self, start: int = 0, **kwargs) -> str:
        self._counter = start
        return f" The counter is at {start}."

    def increment(self, amount: int) -> int:
        """
        Increment the counter.

        Args:
            amount: What is added.
        """
        self._counter += amount
        return self._counter

    async def value(self) -> int:
        """Tell the counter's value."""
        return self._counter

    def _hidden(self):
        raise AssertionError("no tool")


def reached(environments, goal, **kwargs):
    assert kwargs["completions"][0][0]["role"] == "assistant"
    return [float(environment._counter == wanted) for environment, wanted in zip(environments, goal)]


def short(completions):
    return [0.25 if len(messages) <= 5 else None for messages in completions]


environment_factory = CounterEnv
reward_funcs = [reached, short]
train_dataset = [
    {"prompt": [{"role": "user", "content": f"Bring the counter to {goal}."}], "start": 2, "goal": goal}
    for goal in range(80)
]
