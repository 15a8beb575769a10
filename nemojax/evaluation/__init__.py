"""Evaluation with lm-evaluation-harness, in process: the command `nemojax evaluate`.

`buckets`, `prefix`, `engine` and `scorer` work on token ids and know nothing of lm-eval; `harness` makes a model of it.
"""
