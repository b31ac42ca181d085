"""The original's evaluation settings."""

from .settings import EVALUATIONS, Evaluation

__all__ = ["EVALUATIONS", "Evaluation"]
