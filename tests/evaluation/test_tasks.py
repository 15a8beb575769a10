"""Task files: found from any directory, and wrong data is named by file and line before anything runs."""

import json

import pytest
from lm_eval.api.model import LM

from nemojax import cli
from nemojax.evaluation import tasks

YAML = "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: mine.jsonl}}\n"
BROKEN = {
    "not JSON": ('{"a": 1}\n{"a": 2\n', "line 2 is not JSON"),
    "not an object": ('{"a": 1}\n\n[1]\n', "line 3 is list"),
    "field missing": ('{"a": 1, "b": 2}\n{"a": 1}\n', "line 2 has no 'b'"),
    "field too many": ('{"a": 1}\n{"a": 1, "b": 2}\n', "line 2 has 'b'"),
    "another type": ('{"a": 1}\n{"a": "x"}\n', "line 2: 'a' is str"),
    "not UTF-8": (b'{"a": 1}\n{"a": "\xff"}\n', "line 2 is not UTF-8"),
    "empty": ("\n", "has no lines"),
}


def write(folder, data):
    (folder / "mine.yaml").write_text(YAML)
    (folder / "mine.jsonl").write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / "mine.yaml"


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named(tmp_path, capsys, case):
    data, message = BROKEN[case]
    path = write(tmp_path, data)
    assert cli.main(["evaluate", str(tmp_path), "--tasks", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "mine.jsonl" in error and error.count("\n") == 1


def test_data_is_found_beside_the_task(tmp_path, monkeypatch):
    path = write(tmp_path, '{"a": 1}\n{"a": 2.5}\n{"a": null}\n')
    monkeypatch.chdir("/")
    (task,) = tasks.resolve(str(path))
    assert task["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "mine.jsonl")}


def test_so_are_files_of_a_pattern(tmp_path):
    files = {"test": ["*.jsonl", "https://x/*.jsonl"]}
    assert tasks._located(files, tmp_path) == {"test": [str(tmp_path / "*.jsonl"), "https://x/*.jsonl"]}


def test_shipped_tasks_are_whole_and_small():
    for name in tasks.shipped():
        (task,) = tasks.resolve(name)
        data = tasks.SHIPPED / f"{name}.jsonl"
        rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
        assert task["task"] == name and len(rows) >= 16 and data.stat().st_size < 60_000
    assert len(tasks.shipped()) >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "no.yaml"], "no such task file"),
        (["--tasks", "python_choise"], "did you mean python_choice"),
        (["--tasks", "a,,b"], "a name is empty"),
        (["--tasks", "python_text,python_text"], "python_text is there twice"),
        (["--tasks", "python_text", "--resume"], "--resume needs --output"),
        (["--tasks", "python_text", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--tasks", "python_text", "--limit", "-1"], "--limit must be a positive number"),
        (["--tasks", "python_text", "--limit", "nan"], "--limit must be a positive number"),
        (["--tasks", "python_text", "--limit", "inf"], "--limit must be a positive number"),
        (["--tasks", "python_text", "--process", "1"], "go together"),
        (
            ["--tasks", "python_text", *["--coordinator", "here", "--processes", "1", "--process", "0"]],
            "must be HOST:PORT, got here",
        ),
        (
            ["--tasks", "python_text", *["--coordinator", "here:1", "--processes", "2", "--process", "2"]],
            "--process must be from 0 to 1",
        ),
        (["--tasks", "python_text", "--output", "CHECKPOINT/."], "--output must not be the checkpoint"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, arguments, message):
    arguments = [argument.replace("CHECKPOINT", str(tmp_path)) for argument in arguments]
    assert cli.main(["evaluate", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


class NoModel(LM):
    """Answers nothing: what is wrong with a task is found before it is asked."""

    loglikelihood = loglikelihood_rolling = generate_until = None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if a %}", "mine cannot be loaded (TemplateSyntaxError: "),
        ("{{ a.b.c }}", "a template of a task cannot be filled in (UndefinedError: "),
    ],
    ids=["not-closed", "not-in-the-second-row"],
)
def test_a_template_that_cannot_be_filled_in_is_said(tmp_path, capsys, monkeypatch, template, message):
    path = write(tmp_path, '{"a": {"b": {"c": "x"}}}\n{"a": {"b": null}}\n')
    told = f"output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{template}'\n"
    path.write_text(YAML + told + "metric_list: [{metric: bits_per_byte}]\n")
    monkeypatch.setattr("nemojax.evaluation.cli._model", lambda *_: NoModel())
    assert cli.main(["evaluate", str(tmp_path), "--tasks", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_files_need_nothing_of_what_lm_eval_ships(tmp_path, monkeypatch):
    """Its thousands of task files are only read for a name: they take longer than a small evaluation."""
    seen = {}
    monkeypatch.setattr("nemojax.evaluation.cli._model", lambda *_: None)
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda _, **given: seen.update(given) or exit(9))
    with pytest.raises(SystemExit, match="9"):
        cli.main(["evaluate", str(tmp_path), "--tasks", "python_text"])
    assert [task.config.task for task in seen["tasks"]] == ["python_text"]
    assert seen["task_manager"].all_tasks == []
