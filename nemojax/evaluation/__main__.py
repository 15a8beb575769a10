"""`python -m nemojax.evaluation ...` is `lm_eval ...` with the model `nemojax`.

lm-eval 0.4.13 has no way for a package to announce a model to the plain command.
"""

from lm_eval.__main__ import cli_evaluate

from nemojax.evaluation import harness  # noqa: F401  registers the model

cli_evaluate()
