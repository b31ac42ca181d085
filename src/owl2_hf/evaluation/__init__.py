"""Evaluation settings of the original code, and Q-Bench."""

from .settings import EVALUATIONS, Evaluation

__all__ = ["EVALUATIONS", "Evaluation"]
