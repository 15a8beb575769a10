"""Research scripts; each runs with `python -m experiments.NAME` and says its command and last result at its top."""
