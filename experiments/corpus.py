"""Text that every machine with Python has: the standard library's sources and its reference prose (PSF licence).

A document is one source file or one topic of `pydoc_data.topics`. Near-copies are dropped, so that no held-out document
has a twin in the training part; a hash of its name decides which part a document belongs to. Of the caller's own files
only exact copies are, and a hash of the text decides.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nemojax.errors import InputError

BOS, EOS = 1, 2
# Nemotron's own ids; the ones without a use here keep their place.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 10)))
SPECIAL_TOKENS += ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
HELD_OUT_SHARE = 20  # one document in so many

# Not every machine has the tests, character tables say little, topics come in their own way.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data", "encodings"}
_SMALLEST = 200  # bytes
_LONG_LINE = 20  # characters; shorter ones (`else:`) are no sign of a copy
_COPIED = 0.5


class Document(NamedTuple):
    """One text and where it comes from."""

    name: str
    text: str


class Corpus(NamedTuple):
    """Two lists of documents that have no text in common."""

    train: list[Document]
    held_out: list[Document]


def standard_library() -> Corpus:
    """The running Python's sources and reference topics, deduplicated and split."""
    return split(deduplicate(sorted(_sources() + _topics())))


def read_files(paths: Iterable[Path]) -> list[Document]:
    """The caller's own files, one document each, in the order of their names.

    Raises:
      InputError: a file cannot be read as UTF-8.
    """
    documents = []
    for path in sorted(paths):
        try:
            documents.append(Document(str(path), path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as text ({error}); give UTF-8 files") from None
    return documents


def from_files(paths: Iterable[Path]) -> Corpus:
    """The caller's own files, split. All of them count, but for empty ones and exact copies of others."""
    documents: dict[str, Document] = {}
    for document in read_files(paths):
        if document.text.strip():
            documents.setdefault(document.text, document)
    # By their texts: the same files are held out wherever they lie, and however their paths are written.
    return split(list(documents.values()), key=lambda d: d.text)


def _sources() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if _LEFT_OUT.intersection(inside.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            found.append(Document(inside.as_posix(), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue  # a few files are in another encoding on purpose
    return found


def _topics() -> list[Document]:
    topics = importlib.import_module("pydoc_data.topics").topics
    return [Document(f"topics/{name}", text) for name, text in topics.items()]


def deduplicate(documents: Iterable[Document]) -> list[Document]:
    """Drops tiny documents, and those of whose longer lines more than half occurred in documents before."""
    seen: set[str] = set()
    texts: set[str] = set()
    kept = []
    for document in documents:
        lines = {line.strip() for line in document.text.splitlines() if len(line.strip()) >= _LONG_LINE}
        is_copy = document.text in texts or len(lines & seen) > _COPIED * len(lines)
        if len(document.text.encode()) >= _SMALLEST and not is_copy:
            kept.append(document)
            texts.add(document.text)
            seen |= lines
    return kept


def split(documents: Sequence[Document], key: Callable[[Document], str] = lambda d: d.name) -> Corpus:
    """Splits by a hash of the key; of few documents, the one with the smallest hash is held out.

    Raises:
      InputError: there are not two documents, or a text is in both parts.
    """
    numbers = [int(hashlib.sha256(key(d).encode()).hexdigest(), 16) for d in documents]
    chosen = {number for number in numbers if number % HELD_OUT_SHARE == 0}
    if not 0 < len(chosen) < len(set(numbers)):
        chosen = {min(numbers, default=0)}
    train = [d for d, number in zip(documents, numbers, strict=True) if number not in chosen]
    held_out = [d for d, number in zip(documents, numbers, strict=True) if number in chosen]
    if not train or not held_out:
        raise InputError(
            f"{len(documents)} documents are too few to hold one out; give at least two that differ and are not empty"
        )
    hashes = [{hashlib.sha256(d.text.encode()).hexdigest() for d in part} for part in (train, held_out)]
    if hashes[0] & hashes[1]:
        raise InputError(
            f"{len(hashes[0] & hashes[1])} held-out texts are also in the training part; remove the copies"
        )
    return Corpus(train, held_out)


def digest(documents: Iterable[Document]) -> str:
    """SHA-256 over all names and texts: the same digest is the same data."""
    total = hashlib.sha256()
    for name, text in documents:
        parts = os.fsencode(name), text.encode()  # a file's name may be no UTF-8
        total.update(b"%d %d " % tuple(map(len, parts)) + b"".join(parts))
    return total.hexdigest()


def size(documents: Iterable[Document]) -> int:
    """Bytes of all texts."""
    return sum(len(d.text.encode()) for d in documents)


# --------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: every text has a spelling, no text is changed."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> list[Int[np.ndarray, " T"]]:
    """Ids of each document, between `<s>` and `</s>`, int32. A `<s>` inside a text is three characters."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    encodings = plain.encode_batch_fast([d.text for d in documents], add_special_tokens=False)
    return [np.array([BOS, *encoding.ids, EOS], np.int32) for encoding in encodings]


def token_bytes(tokenizer: Tokenizer) -> Int[np.ndarray, " V"]:
    """Bytes of text that each id stands for; special tokens none."""
    found = np.zeros(ids(tokenizer), np.int32)
    for token, i in tokenizer.get_vocab().items():
        found[i] = 0 if i < len(SPECIAL_TOKENS) else len(token)
    return found


def check_ids(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises an `InputError` if the tokenizer has more ids than the model."""
    if (count := ids(tokenizer)) > vocab_size:
        raise InputError(f"the tokenizer has {count} ids, the model only {vocab_size}; raise vocab_size")


def ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id; some below it may have no token."""
    return max(tokenizer.get_vocab().values()) + 1
