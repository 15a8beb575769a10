"""Correctness and speed of the kernels and of a whole model on a GPU; `__main__.py` has the command."""
