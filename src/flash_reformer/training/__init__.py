"""Training Reformers on text."""

from flash_reformer.training.recipes import TrainingResult, resume_clm, train_clm
from flash_reformer.training.settings import PRESETS, TrainingSettings

__all__ = ["PRESETS", "TrainingResult", "TrainingSettings", "resume_clm", "train_clm"]
