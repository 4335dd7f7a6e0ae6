"""Environments after TRL 1.16: two kinds, chosen by a column; each pays by itself, one gives the prompt in `reset`."""


class Adder:
    def __init__(self):
        self.total = 0

    @property
    def explosive(self):
        raise AssertionError("properties are no tools")

    def reset(self, **kwargs):
        assert "environment" not in kwargs
        self.total, self.goal = 0, kwargs["goal"]
        return [{"type": "text", "text": f" Reach {self.goal}."}]

    def add(self, amount: int) -> int:
        """Add."""
        self.total += amount
        return self.total

    def get_reward(self) -> float:
        return float(self.total == self.goal)


class Asker:
    def reset(self, **kwargs) -> str:
        self.called = 0
        return "Ask."

    def ask(self) -> dict:
        """Ask."""
        self.called += 1
        return {"called": self.called}

    async def get_reward(self) -> float:
        return self.called / 4


def roles(completions, **kwargs):
    return [0.001 * len([message for message in completions[0] if message.get("tool_calls")])]


environment_factory = {"adder": Adder, "asker": Asker}
reward_funcs, reward_weights = roles, [10.0]
train_dataset = [
    {"prompt": "Add.", "environment": "adder", "goal": 3},
    {"environment": "asker", "goal": 0},
]
eval_dataset = [{"prompt": "Add.", "environment": "adder", "goal": 4}]
