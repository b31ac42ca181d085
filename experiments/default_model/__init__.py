"""How the model in `src/owl2_hf/default/` was made: `python -m experiments.default_model.train
--out DIR`.
"""
