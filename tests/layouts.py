"""Batches of three short documents, written as strings."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LENGTH = 20
# Three documents of 20 tokens; ids start at 1, so that token 0 stands for pads only.
DOCUMENTS = np.random.default_rng(11).integers(1, 50, (3, LENGTH)).astype(np.int32)


class Span(NamedTuple):
    """Where a document, cut to `length`, stands in a batch."""

    row: int
    start: int
    length: int
    document: int

    def of(self, per_document: np.ndarray) -> np.ndarray:
        """This span's part of an array [document, token, ...]."""
        return per_document[self.document, : self.length]


def place(rows: list[str], width: int, pad_token: int = 0) -> tuple[np.ndarray, np.ndarray, list[Span]]:
    """Tokens, segment ids and spans of rows like `"5 a20 b3"`: five pads, 20 tokens of document a, 3 of b.

    Segment ids neither start at 1 nor increase, and a document that comes again in a row gets another id.
    """
    tokens = np.full((len(rows), width), pad_token, np.int32)
    segment_ids = np.zeros((len(rows), width), np.int32)
    spans = []
    for row, text in enumerate(rows):
        at = 0
        for count, item in enumerate(text.split()):
            document = "abc".find(item[0])
            length = int(item.lstrip("abc"))
            if document >= 0:
                tokens[row, at : at + length] = DOCUMENTS[document, :length]
                segment_ids[row, at : at + length] = 100 * (9 - count % 9) + document + 1
                spans.append(Span(row, at, length, document))
            at += length
        assert at <= width, f"{text!r} is longer than {width}"
    return tokens, segment_ids, spans


def document_of(segment_ids: np.ndarray) -> np.ndarray:
    """Which document each position holds, from the ids that `place` gives; -1 at pads."""
    return segment_ids % 100 - 1
