"""The tokenizer that travels with a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from tokenizers import Tokenizer

from nemojax.errors import InputError


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The `tokenizer.json` of a checkpoint directory, which takes a text whole and adds no pads.

    Raises:
      InputError: there is none, or it is damaged.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{file}: no such file; copy the model's tokenizer.json beside its weights")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for every defect
        raise InputError(f"{file}: not a tokenizer ({error}); download it again") from None
    # The file remembers how the tokenizer was called last, in training for example.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
