"""Training of MoHGE models with Hugging Face Trainer."""

from .metrics import RouterStatistics
from .trainer import MoHGETrainer, RouterScheduleCallback


__all__ = ["MoHGETrainer", "RouterScheduleCallback", "RouterStatistics"]
