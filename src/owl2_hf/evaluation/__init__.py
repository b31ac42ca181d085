"""The original's evaluation settings, and a model for the harness lmms-eval."""

from .settings import EVALUATIONS, Evaluation

__all__ = ["EVALUATIONS", "Evaluation"]
