"""`python -m nemojax` is the `nemojax` command."""

from nemojax.cli import run

run()
