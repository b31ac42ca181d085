"""All measurements on a GPU, one command: `python -m benchmarks.gpu`. See `__main__.py`."""
