"""A single-turn environment after the documented interface of verifiers 0.1, in an earlier spelling."""


def has_answer(completion, answer):
    return float(answer in completion[0]["content"])


class Rubric:
    reward_funcs, reward_weights = (has_answer,), (2.0,)


class SingleTurnEnv:
    max_turns = 1
    rubric = Rubric()

    def get_dataset(self, n=-1, seed=None):
        prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]
        return [{"prompt": prompt, "answer": "2"}, {"prompt": "2+2=", "answer": "4"}, {"prompt": "2+3=", "answer": "5"}]

    def setup_state(self, state):
        return state

    def env_response(self, messages, state):
        raise NotImplementedError

    def is_completed(self, messages, state):
        raise NotImplementedError


def load_environment():
    return SingleTurnEnv()
