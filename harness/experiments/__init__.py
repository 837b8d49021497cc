"""Experiments: grids of ordinary runs, what was measured on them, and the claims that they decide."""
