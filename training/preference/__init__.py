"""Preference learning: TRL's trainers with the mixture's own balance loss."""

from molora.training.preference.trainers import DPOTrainer, GRPOTrainer

__all__ = ["DPOTrainer", "GRPOTrainer"]
