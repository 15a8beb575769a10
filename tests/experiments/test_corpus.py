"""The corpus: parts that share nothing, a tokenizer that loses nothing, rows that lose nothing."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from experiments import corpus, packing
from experiments.corpus import BOS, EOS, Document
from nemojax.errors import InputError

CODE = "def add(first_number, second_number):\n    return first_number + second_number\n"


def texts(count):
    return [Document(f"file{i}.py", f"# number {i}\n" + CODE.replace("add", f"function_{i}") * 6) for i in range(count)]


@pytest.fixture(scope="module")
def library():
    return corpus.standard_library()


def test_parts_share_no_text(library):
    train, held_out = ({d.text for d in part} for part in library)
    assert not train & held_out
    assert corpus.size(library.train) > 4e6 and corpus.size(library.held_out) > 1e5


def test_same_digest_same_data(library):
    again = corpus.standard_library()
    assert [corpus.digest(part) for part in again] == [corpus.digest(part) for part in library]
    changed = [library.train[0]._replace(text=library.train[0].text + " "), *library.train[1:]]
    assert corpus.digest(changed) != corpus.digest(library.train)


def test_part_depends_on_the_name_alone():
    documents = texts(200)
    few = corpus.split(documents[::2])
    assert set(few.held_out) <= set(corpus.split(documents).held_out)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_of_few_documents_one_is_held_out(count):
    few = corpus.split(texts(count))
    assert len(few.held_out) == 1 and len(few.train) == count - 1


def test_of_documents_whose_hashes_all_hold_them_out_one_is():
    held_out = corpus.split(texts(200)).held_out[:2]
    assert len(corpus.split(held_out).held_out) == 1


def test_one_document_cannot_be_split():
    with pytest.raises(InputError, match="1 documents are too few"):
        corpus.split(texts(1))


def test_near_copies_are_dropped():
    original = Document("a.py", "".join(f"a line of its own, number {i}\n" for i in range(40)))
    copy = Document("b.py", "# a new first line of some length\n" + original.text)
    other = Document("c.py", original.text.replace("its own", "another file"))
    assert corpus.deduplicate([original, copy, other, Document("d.py", "tiny")]) == [original, other]
    short = Document("e.py", "a = 1\n" * 60)
    assert corpus.deduplicate([short, short._replace(name="f.py")]) == [short]


def test_own_files_all_count(tmp_path):
    """Short ones, and those that share most of their lines; not empty ones and exact copies."""
    head = "a system prompt that all of them have, in one long line\n"
    found = {f"{i:02}.txt": f"{head}question {i}" for i in range(30)}
    found |= {"empty.txt": " \n", "twin.txt": f"{head}question 3"}
    for name, text in found.items():
        (tmp_path / name).write_text(text)
    parts = corpus.from_files(tmp_path.iterdir())
    assert sorted(Path(d.name).name for part in parts for d in part) == sorted(found)[:30]
    assert all(part == sorted(part) for part in parts)


def test_own_files_are_split_alike_however_their_paths_are_written(tmp_path, monkeypatch):
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text(f"question {i}")
    held_out = lambda folder: [Path(d.name).name for d in corpus.from_files(Path(folder).iterdir()).held_out]
    expected = held_out(tmp_path)
    assert 0 < len(expected) < 60
    for place, folder in ((tmp_path, "."), (tmp_path.parent, tmp_path.name)):
        monkeypatch.chdir(place)
        assert held_out(folder) == expected


def test_a_name_that_is_not_utf_8_is_one(tmp_path):
    for name in (b"a\xff.txt", b"b.txt"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"text")
    parts = corpus.read_files(tmp_path.iterdir())
    assert len(corpus.digest(parts)) == 64


def test_the_same_text_in_both_parts_is_refused():
    documents = texts(100)
    held_out = corpus.split(documents).held_out[0]
    with pytest.raises(InputError, match="1 held-out texts are also in the training part"):
        corpus.split([*documents, Document("file0.py", held_out.text)])


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    for name in ("latin.txt", "missing.txt"):
        with pytest.raises(InputError, match=f"{name}: cannot be read as text"):
            corpus.read_files([tmp_path / name])


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer(texts(20), 320)


def test_special_tokens_have_nemotrons_ids(tokenizer):
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 10, "<|im_end|>": 11, "<think>": 12, "</think>": 13}
    assert {token: tokenizer.token_to_id(token) for token in ids} == ids
    assert tokenizer.get_vocab_size() == 320


@given(st.text())
@example("(?P<s>x)</s><|im_end|>")
@settings(max_examples=50)
def test_text_survives(tokenizer, text):
    (ids,) = corpus.encode(tokenizer, [Document("", text)])
    assert ids[0] == BOS and ids[-1] == EOS
    assert tokenizer.decode(ids[1:-1].tolist(), skip_special_tokens=False) == text
    assert corpus.token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_ids_without_a_token():
    with_hole = Tokenizer(models.WordLevel({"<unk>": 0, "three": 14, "four!": 17}, unk_token="<unk>"))
    assert corpus.token_bytes(with_hole).tolist() == [*[0] * 14, 5, 0, 0, 5]


def test_a_prompt_begins_as_a_document_does(tokenizer):
    assert tokenizer.encode(CODE).ids == corpus.encode(tokenizer, [Document("", CODE)])[0][:-1].tolist()


# ------------------------------------------------------------------------------------------------------ packing


def documents(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 90, rng.integers(1, 60)).astype(np.int32) for _ in range(count)]


@pytest.mark.parametrize("length", [1, 7, 16, 1000])
def test_packing_loses_nothing(length):
    given_documents = documents(20)
    batch = packing.pack(given_documents, length)
    real = batch.segment_ids > 0
    assert batch.tokens[real].tolist() == np.concatenate(given_documents).tolist()
    assert (real.reshape(-1) == (np.arange(real.size) < real.sum())).all()  # padding only at the very end
    assert (batch.segment_ids[:, 0] <= 1).all()
    owners = np.repeat(np.arange(20), [len(d) for d in given_documents])
    ids = np.where(real, np.arange(len(real))[:, None] * 1000 + batch.segment_ids, 0)[real]
    same_row = np.flatnonzero(real.reshape(-1))[1:] % length != 0
    assert ((ids[1:] == ids[:-1]) == (owners[1:] == owners[:-1]))[same_row].all()


def test_an_epoch_has_every_token_once_and_each_its_own_order():
    given_documents = documents(50)
    stream = packing.Stream(given_documents, length=32, rows=3, seed=[1])
    rows = [row for step in range(2 * stream.rows_per_epoch) for row in zip(*stream.batch(step), strict=True)]
    epochs = [rows[i : i + stream.rows_per_epoch] for i in range(0, 6 * stream.rows_per_epoch, stream.rows_per_epoch)]
    counts = [np.bincount(np.concatenate([t[s > 0] for t, s in epoch]), minlength=90).tolist() for epoch in epochs]
    assert counts == [np.bincount(np.concatenate(given_documents), minlength=90).tolist()] * 6
    assert not np.array_equal([t for t, _ in epochs[0]], [t for t, _ in epochs[1]])


def test_a_batch_depends_on_documents_seed_and_step_alone():
    make = lambda seed: packing.Stream(documents(50), length=32, rows=3, seed=[seed])
    stream = make(1)
    for step in (40, 0, 7):  # in any order
        assert all(map(np.array_equal, stream.batch(step), make(1).batch(step)))
        assert not np.array_equal(stream.batch(step).tokens, make(2).batch(step).tokens)


def test_too_little_text_is_refused():
    with pytest.raises(InputError, match="fill 1 rows of 4096 tokens, a batch has 2"):
        packing.Stream(documents(5), length=4096, rows=2, seed=[0])
