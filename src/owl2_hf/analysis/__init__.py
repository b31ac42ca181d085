"""Analyse what a model attends to: attention by modality, query maps, and norms by modality.

The analyses of the paper (mPLUG-Owl2, CVPR 2024, arXiv:2311.04257), for any model of the family.
"""

from .attention import (
    QueryAttention,
    attention_mass,
    attention_shares,
    query_maps,
    uniform_attention,
)
from .findings import Run
from .report import Analysis, analyze, check_target

__all__ = [
    "Analysis",
    "QueryAttention",
    "Run",
    "analyze",
    "attention_mass",
    "attention_shares",
    "check_target",
    "query_maps",
    "uniform_attention",
]
