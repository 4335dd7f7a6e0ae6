"""A multi-turn environment after the documented interface of verifiers 0.1: no import of the library is needed here."""


class Rubric:
    def __init__(self, funcs, weights):
        self.funcs, self.weights, self.class_objects = funcs, weights, {"parser": str.strip}


class SumEnv:
    """Asks again, with a hint, until the sum is right or three answers were given."""

    max_turns = 3
    system_prompt = "Answer with a number."

    def __init__(self):
        self.dataset = [
            {"question": f"{a} + {b}", "answer": str(a + b), "info": {"a": a}} for a in range(1, 9) for b in range(1, 9)
        ]
        self.eval_dataset = [{"question": f"{a} + 9", "answer": str(a + 9)} for a in range(9)]
        self.rubric = Rubric([right, few_turns, never_called], [1.0, 0.5, 0.0])

    async def setup_state(self, state):
        state["hints"] = 0

    async def is_completed(self, state):
        last = state["trajectory"][-1]["completion"][-1]["content"]
        return last.strip() == state["answer"]

    async def env_response(self, messages, state):
        assert messages[-1]["role"] == "assistant" and messages[0]["role"] == "system"
        state["hints"] += 1
        return [{"role": "user", "content": f"Wrong, hint {state['hints']}."}]


async def right(completion, answer, parser):
    return float(parser(completion[-1]["content"]) == answer)


def few_turns(state, **kwargs):
    assert kwargs["info"] == state["info"]
    return 1.0 - len(state["trajectory"]) / 4


def never_called(prompt):
    raise AssertionError("a weight of zero")


def load_environment(**kwargs):
    return SumEnv()
