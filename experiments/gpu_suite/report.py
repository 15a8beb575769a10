"""The results as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(path: Path, about: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    """Writes PATH.json and PATH.md; the files are whole at any moment."""
    for suffix, text in (
        (".json", json.dumps({"about": about, "rows": rows}, indent=1)),
        (".md", markdown(about, rows)),
    ):
        target = path.with_name(path.name + suffix)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(target)


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each result that is wrong or missing."""
    name = lambda row: f"{row['case']}, {row['implementation']}" if "implementation" in row else row["case"]
    wrong = [
        f"{name(row)}: error {row['error']:.1e}, limit {row['limit']:.1e}" for row in rows if not row.get("ok", True)
    ]
    return wrong + [f"{name(row)}: {row['failed']}" for row in rows if "failed" in row]


def markdown(about: dict[str, str], rows: Sequence[dict[str, Any]]) -> str:
    """Tables of times and of checks, and what failed."""
    lines = ["# " + about["card"], "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    if problems := failures(rows):
        lines += ["## Failed", "", *(f"- {problem}" for problem in problems), ""]
    return "\n".join([*lines, *_speeds(rows), *_model(rows), *_kernels(rows), *_checks(rows)]).rstrip()


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    if not body:
        return []
    rule = "|".join("---" if i < 2 else "--:" for i in range(len(head)))
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in body), ""]


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-2 else f"{seconds * 1e3:,.2f} ms"


def _speeds(rows):
    speeds = [row for row in rows if row["kind"] == "speed"]
    floors = {row["case"]: row["floor_seconds"] for row in speeds if "floor_seconds" in row}
    body = []
    for row in speeds:
        floor = floors.get(row["case"])
        if "seconds" not in row:
            body.append([row["case"], row["implementation"], row.get("absent", "failed"), *[""] * 4])
            continue
        share = f"{floor / row['seconds']:.0%}" if floor else ""
        compiled = f"{row['compile_seconds']:.1f} s" if "compile_seconds" in row else ""
        kernels = _time(sum(kernel["seconds"] for kernel in row["kernels"])) if row.get("kernels") else ""
        times = [_time(row["seconds"]), kernels, _time(floor) if floor else "", share, compiled]
        body.append([row["case"], row["implementation"], *times])
    head = ["operation", "implementation", "time", "its kernels", "floor", "of the floor", "compile"]
    return _table(head, sorted(body, key=lambda row: list(floors).index(row[0]) if row[0] in floors else len(floors)))


def _model(rows):
    body = []
    for row in rows:
        if row["kind"] != "model" or "seconds" not in row or "failed" in row:
            continue
        floor = row.get("floor_seconds")
        memory = f"{row['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in row else ""
        rate = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
        share = f"{floor / row['seconds']:.0%}" if floor else ""
        body.append([row["case"], _time(row["seconds"]), _time(floor) if floor else "", share, rate, memory])
    return _table(["whole model", "time", "floor", "of the floor", "tokens/s", "peak memory"], body)


def _kernels(rows):
    """What takes a twentieth of a call or more."""
    body = []
    for row in (row for row in rows if row.get("kernels")):
        total = sum(kernel["seconds"] for kernel in row["kernels"])
        for kernel in (kernel for kernel in row["kernels"] if kernel["seconds"] >= total / 20):
            numbers = [f"{kernel['launches']:,.4g}", _time(kernel["seconds"]), f"{kernel['seconds'] / total:.0%}"]
            body.append([f"{row['case']} {row.get('implementation', '')}".rstrip(), f"`{kernel['name']}`", *numbers])
    return _table(["where the time goes", "kernel", "launches", "time", "share"], body)


def _checks(rows):
    body = [
        [row["case"], row["implementation"], f"{row['error']:.1e}", f"{row['limit']:.1e}"]
        for row in rows
        if row["kind"] == "check" and "error" in row
    ]
    return _table(["against float32", "implementation", "relative error", "limit"], body)
