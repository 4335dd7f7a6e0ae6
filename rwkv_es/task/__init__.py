"""Problems and the prompts that ask them."""

from rwkv_es.task.task import SYSTEM, Generated, Problem, Task, load_task

__all__ = ["SYSTEM", "Generated", "Problem", "Task", "load_task"]
