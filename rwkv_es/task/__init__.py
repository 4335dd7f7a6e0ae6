"""Problems and the prompts that ask them."""

from rwkv_es.task.task import SYSTEM, Generated, Problem, Task, load_task
from rwkv_es.task.turns import Done, Reply

__all__ = ["SYSTEM", "Done", "Generated", "Problem", "Reply", "Task", "load_task"]
