"""Batches of three short documents, written as strings."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

LENGTH = 20
# Three documents of 20 tokens; ids start at 1, so that token 0 stands for pads only.
DOCUMENTS = np.random.default_rng(11).integers(1, 50, (3, LENGTH)).astype(np.int32)
_LAST_DIGIT = (7, 3, 9)  # of a document's segment id: neither 1, 2, 3 nor increasing

WIDTH = 32
# A row is a list of spans, see `place`. What is left of the row is pads.
LAYOUTS = {
    "left-pads": ["12 a20", "23 b9", "29 c3"],
    "right-pads": ["a20", "b9", "c3"],
    "pads-on-both-sides": ["6 a20", "11 b9", "15 c3"],
    "packed": ["a20 b9 c3", "c3 b9 a20", "b9 a20 c3"],
    "packed-shorter-than-the-convolution": ["a1 b2 c3 a1 b1 c20", "c2 a2 b2 c2 a2 b2 c20", "b3 a1 b1 a16 c11"],
    "pads-between-documents": ["a13 1 b9 2 c3", "2 c3 4 a20 1 b2", "b9 3 c1 3 a16"],
    "boundaries-at-chunk-edges": ["a8 b8 c16", "8 b16 8", "a16 8 c8"],
    "boundaries-beside-chunk-edges": ["a7 b2 c16 7", "a9 7 b15", "7 b1 a17 c7"],
    "a-row-of-pads": ["a20 b9", "", "5 c20"],
}


class Span(NamedTuple):
    """Tokens `offset` to `offset + length` of a document, and where they stand in a batch."""

    row: int
    start: int
    document: int
    offset: int
    length: int

    def of(self, per_document: np.ndarray) -> np.ndarray:
        """This span's part of an array [document, token, ...]."""
        return per_document[self.document, self.offset : self.offset + self.length]

    def here(self, batch: np.ndarray) -> np.ndarray:
        """This span's part of an array [row, position, ...]."""
        return batch[self.row, self.start : self.start + self.length]


def place(
    rows: list[str], width: int, pad_token: int = 0, generation: int = 0
) -> tuple[np.ndarray, np.ndarray, list[Span]]:
    """Tokens, segment ids and spans of rows like `"5 a20 b4:7"`: five pads, 20 tokens of a, tokens 4, 5, 6 of b.

    A document that comes again in a row gets another id. Batches of one generation share ids, so that a later call goes
    on with the documents of an earlier one; another generation has other ids.
    """
    tokens = np.full((len(rows), width), pad_token, np.int32)
    segment_ids = np.zeros((len(rows), width), np.int32)
    spans = []
    for row, text in enumerate(rows):
        at, seen = 0, []
        for name, offset, end in re.findall(r"([abc]?)(?:(\d+):)?(\d+)", text):
            document, offset = "abc".find(name or "-"), int(offset or 0)
            length = int(end) - offset
            if document >= 0:
                tokens[row, at : at + length] = DOCUMENTS[document, offset : offset + length]
                segment_ids[row, at : at + length] = _LAST_DIGIT[document] + 10 * seen.count(name) + 1000 * generation
                spans.append(Span(row, at, document, offset, length))
                seen.append(name)
            at += length
        assert at <= width, f"{text!r} is longer than {width}"
    return tokens, segment_ids, spans


def is_document(segment_ids: np.ndarray, document: int) -> np.ndarray:
    """Where a document stands, from the ids that `place` gives."""
    return segment_ids % 10 == _LAST_DIGIT[document]
