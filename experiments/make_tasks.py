"""Makes the tasks that ship with nemojax: `python -m experiments.make_tasks`.

They need no network and mean something for nemotron-tiny, which knows Python's standard library and nothing else. The
text is from files that its training never saw (the digest in `nemotron_tiny/run.json` is checked).

python_choice   multiple choice: which lines follow? The wrong ones are from other places of the same file.
python_text     perplexity of held-out source files.
python_keyword  generation, exact match: which keyword begins the next line?
chain_sum       generation, exact match: sums from reasoning-gym, for models that can add (nemotron-tiny cannot).

Last result: 60, 16, 80 and 100 samples; see the README for the scores.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments import corpus
from nemojax.cli import one_line
from nemojax.errors import InputError
from nemojax.evaluation.tasks import SHIPPED

RECORD = Path(__file__).parent / "nemotron_tiny" / "run.json"
CHOICES, CONTEXT_LINES, ANSWER_LINES = 4, 12, 2
TEXT_BYTES = 3000
KEYWORD_LINES = 8
KEYWORD = re.compile(r"\s*(assert|break|class|continue|def|elif|else|except|for|if|raise|return|while)\b")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 2 where the data cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    return one_line("error", write)


def write() -> int:
    """Writes every task's data."""
    texts = corpus.standard_library()
    if corpus.digest(texts.train) != json.loads(RECORD.read_text())["train_sha256"]:
        raise InputError("this Python's standard library is not the one that nemotron-tiny was trained on (3.12.1)")
    sources = [d for d in texts.held_out if d.name.endswith(".py")]
    data = {
        "python_choice": choice(sources, 60),
        "python_text": text(sources, 16),
        "python_keyword": keyword(sources, 80),
        "chain_sum": chain_sum(100),
    }
    for name, rows in data.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (SHIPPED / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name:14} {len(lines):4} samples, {sum(len(line.encode()) + 1 for line in lines):,} bytes")
    return 0


def choice(documents: Sequence[corpus.Document], count: int) -> Iterator[dict]:
    """Lines of a file, what follows them, and as many lines from elsewhere in the file."""
    rng = random.Random(0)
    span = CONTEXT_LINES + ANSWER_LINES
    long = [d for d in documents if len(_lines(d)) > 4 * span]
    for i in range(count):
        document = long[i % len(long)]
        lines = _lines(document)
        at = rng.randrange(len(lines) - span)
        answer = at + CONTEXT_LINES
        places = [p for p in range(len(lines) - ANSWER_LINES) if abs(p - answer) > span]
        picked = [answer, *rng.sample(places, CHOICES - 1)]
        rng.shuffle(picked)
        yield {
            "file": document.name,
            "context": "\n".join(lines[at:answer]) + "\n",
            "choices": ["\n".join(lines[p : p + ANSWER_LINES]) for p in picked],
            "answer": picked.index(answer),
        }


def _lines(document: corpus.Document) -> list[str]:
    return [line for line in document.text.splitlines() if line.strip() and len(line) <= 100]


def text(documents: Sequence[corpus.Document], count: int) -> Iterator[dict]:
    """The beginnings of held-out files."""
    for document in sorted(documents, key=lambda d: d.name)[:count]:
        yield {"file": document.name, "text": document.text.encode()[:TEXT_BYTES].decode(errors="ignore")}


def keyword(documents: Sequence[corpus.Document], count: int) -> Iterator[dict]:
    """Lines of a file up to one that begins with a keyword."""
    rng = random.Random(0)
    places = [
        (document.name, lines[at - KEYWORD_LINES : at], word)
        for document in documents
        for lines in [_lines(document)]
        for at in range(KEYWORD_LINES, len(lines))
        if (word := KEYWORD.match(lines[at]))
    ]
    for name, lines, word in rng.sample(places, count):
        yield {"file": name, "prompt": "\n".join(lines), "answer": word[1]}


def chain_sum(count: int) -> Iterator[dict]:
    """Sums of two to four numbers of one or two digits."""
    try:
        import reasoning_gym
    except ImportError:
        raise InputError("reasoning_gym is missing; pip install reasoning-gym") from None
    for row in reasoning_gym.create_dataset("chain_sum", size=count, seed=0, max_terms=4, max_digits=2):
        yield {"question": row["question"], "answer": row["answer"]}


if __name__ == "__main__":
    sys.exit(main())
