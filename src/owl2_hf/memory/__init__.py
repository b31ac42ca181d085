"""How much GPU memory a task needs, computed from a configuration without any weights.

The package's own code runs on tensors that have shapes but no data, and what it allocates is
counted. So the numbers follow the code, the recipes and PEFT.
"""

from .estimate import (
    CARDS,
    WEIGHTS,
    Memory,
    inference_memory,
    memory_of_tasks,
    smallest_card,
    training_memory,
    usual_length,
)

__all__ = [
    "CARDS",
    "WEIGHTS",
    "Memory",
    "inference_memory",
    "memory_of_tasks",
    "smallest_card",
    "training_memory",
    "usual_length",
]
