"""`python -m owl2_hf` is the `owl2-hf` command."""

from .cli import app

app()
