"""The model inside other programs: vLLM and lmms-eval load these files by the entry points in pyproject.toml."""
