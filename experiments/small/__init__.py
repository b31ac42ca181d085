"""A small real model, through both stages of the paper."""
