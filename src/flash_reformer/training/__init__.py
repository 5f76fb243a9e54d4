"""Training Reformers: language models, classifiers and answer finders."""

from flash_reformer.training.estimate import Estimate
from flash_reformer.training.finite import DivergedError
from flash_reformer.training.presets import PRESETS
from flash_reformer.training.recipes import LostRankError, dry_run, resume, resume_clm, train, train_clm
from flash_reformer.training.results import TrainingResult
from flash_reformer.training.settings import TrainingSettings
from flash_reformer.training.signals import Terminated
from flash_reformer.training.tasks import TASKS

__all__ = [
    "PRESETS",
    "TASKS",
    "DivergedError",
    "Estimate",
    "LostRankError",
    "Terminated",
    "TrainingResult",
    "TrainingSettings",
    "dry_run",
    "resume",
    "resume_clm",
    "train",
    "train_clm",
]
