"""Attention at full speed. Imports nothing of the project; model.py has the readable form, which says what it is."""
