"""Integrations. vLLM and lmms-eval find them by the entry points in pyproject.toml."""
