"""The README's scripts run as they are shown, one after the other in one session."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_python_blocks_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    session = {}
    for block in blocks:
        exec(block, session)
    assert "(1, 8, 4096) float32" in capsys.readouterr().out
    assert session["rest"].cache.length.tolist() == [8]
