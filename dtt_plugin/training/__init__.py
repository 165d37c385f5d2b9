"""Training DefensiveTokens: prompt tuning with the StruQ loss on a frozen model."""

from dtt_plugin.training.options import TrainingOptions
from dtt_plugin.training.train import train

__all__ = ["TrainingOptions", "train"]
