"""Training Reformers: language models, classifiers and answer finders."""

from flash_reformer.training.estimate import Estimate
from flash_reformer.training.presets import PRESETS
from flash_reformer.training.recipes import TrainingResult, dry_run, resume, resume_clm, train, train_clm
from flash_reformer.training.settings import TrainingSettings
from flash_reformer.training.tasks import TASKS

__all__ = [
    "PRESETS",
    "TASKS",
    "Estimate",
    "TrainingResult",
    "TrainingSettings",
    "dry_run",
    "resume",
    "resume_clm",
    "train",
    "train_clm",
]
