"""A small real model through both stages, and the paper's questions at small scale: scripts that
anyone can rerun.
"""
