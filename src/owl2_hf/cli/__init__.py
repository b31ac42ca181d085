"""The `owl2-hf` command: one file for each group of commands."""

# Importing a group adds its commands; the help lists them in this order.
from . import asking, chat, inspection, scoring, judging, checkpoints, training, serving  # noqa: F401, I001
from .app import app

__all__ = ["app"]
