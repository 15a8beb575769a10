"""Answers survive a kill at any byte, and are not mixed with those of another evaluation."""

import json

import pytest

from nemojax import InputError
from nemojax.evaluation.record import ANSWERS, Record, fingerprint, key

LINES = [{"key": "a", "kind": "x", "result": [-1.5, True]}, {"key": "b", "kind": "x", "result": "text\n"}]


def test_every_cut_keeps_the_whole_lines(tmp_path):
    record = Record(tmp_path / "run", {"seed": 0}, resume=False)
    record.append(LINES)
    record.close()
    whole = (tmp_path / "run" / ANSWERS).read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        (tmp_path / "run" / ANSWERS).write_bytes(whole[:size])
        record = Record(tmp_path / "run", {"seed": 0}, resume=True)
        assert len(record.answers) == (size >= first) + (size == len(whole))
        record.append(LINES[len(record.answers) :])
        record.close()
        assert (tmp_path / "run" / ANSWERS).read_bytes() == whole


@pytest.mark.parametrize(
    ("settings", "resume", "message"),
    [({"seed": 0}, False, "add --resume"), ({"seed": 1}, True, "has seed 0, the command 1")],
    ids=["without resume", "other settings"],
)
def test_another_evaluation_is_refused(tmp_path, settings, resume, message):
    Record(tmp_path, {"seed": 0}, resume=False).close()
    with pytest.raises(InputError, match=message):
        Record(tmp_path, settings, resume=resume)


def test_answers_to_nobody_knows_what_are_refused(tmp_path):
    (tmp_path / ANSWERS).write_text('{"important": 1}')
    for resume in (False, True):
        with pytest.raises(InputError, match="of what, no run.json beside it says"):
            Record(tmp_path, {}, resume=resume)
    assert (tmp_path / ANSWERS).read_text() == '{"important": 1}'


def test_two_at_a_time_are_refused(tmp_path):
    record = Record(tmp_path, {}, resume=False)
    with pytest.raises(InputError, match="another run is writing there"):
        Record(tmp_path, {}, resume=True)
    record.append(LINES)
    record.close()
    record = Record(tmp_path, {}, resume=True)
    assert len(record.answers) == len(LINES)
    record.close()


def test_a_damaged_line_is_named(tmp_path):
    Record(tmp_path, {}, resume=False).close()
    (tmp_path / ANSWERS).write_text(json.dumps(LINES[0]) + "\nnot json\n")
    with pytest.raises(InputError, match="line 2 is not an answer"):
        Record(tmp_path, {}, resume=True)


def test_keys_and_fingerprints_tell_apart(tmp_path):
    assert len({key("a", ["x"], 0), key("b", ["x"], 0), key("a", ["y"], 0), key("a", ["x"], 1)}) == 4
    (tmp_path / "weights").write_bytes(bytes(300_000))
    before = fingerprint(tmp_path)
    assert before == fingerprint(tmp_path)
    for at in (0, 150_000, 299_999):
        (tmp_path / "weights").write_bytes(bytes(at) + b"\1" + bytes(299_999 - at))
        assert fingerprint(tmp_path) != before


def test_answers_may_lie_beside_the_weights(tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "d").write_bytes(b"x")
    before = fingerprint(tmp_path)
    record = Record(tmp_path / "eval", {}, resume=False)
    record.append(LINES)
    record.close()
    assert fingerprint(tmp_path) == before
    (tmp_path / "params" / "d").write_bytes(b"y")
    assert fingerprint(tmp_path) != before
