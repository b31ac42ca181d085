"""All measurements on a GPU, one command: `python -m benchmarks.gpu`. See `__main__.py`.

The machine needs no network. It needs this repository, PyTorch for CUDA, and what the package
depends on (pyproject.toml). The package itself need not be installed: this checkout is measured.

The server also needs the extra `serve`, and QLoRA the extra `qlora`. Without them the results say so
in the place of these steps, and all other steps run.
"""
