"""Attention at full speed. Imports nothing of the project. The readable form, which defines it, is in model.py."""
