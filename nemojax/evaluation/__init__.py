"""Evaluation with lm-evaluation-harness, in process: `nemojax evaluate`, or `import nemojax.evaluation` and model "nemojax".

buckets, prefix, engine and scorer work on token ids and know nothing of lm-eval; harness, tasks and run do.
"""
