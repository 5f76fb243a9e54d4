"""The four tasks, by the names that the command line gives them."""

from flash_reformer.training.tasks.answers import QuestionAnswering
from flash_reformer.training.tasks.causal import CausalLanguageModelling
from flash_reformer.training.tasks.classify import SequenceClassification
from flash_reformer.training.tasks.masked import MaskedLanguageModelling
from flash_reformer.training.tasks.task import Measure, Task

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (CausalLanguageModelling, MaskedLanguageModelling, SequenceClassification, QuestionAnswering)
}

__all__ = ["TASKS", "Measure", "Task"]
