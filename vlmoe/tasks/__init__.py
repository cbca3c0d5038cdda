"""What can be learned and scored."""

from vlmoe.tasks.load import LoadedRun, load_run
from vlmoe.tasks.registry import TASKS, make_task
from vlmoe.tasks.task import Inputs, Task, TaskLoss

__all__ = ["TASKS", "Inputs", "LoadedRun", "Task", "TaskLoss", "load_run", "make_task"]
