"""How the scorer in `src/owl2_hf/default_scorer/` was made: `python -m
experiments.default_scorer.make --out DIR`.
"""
