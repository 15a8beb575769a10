"""A checkpoint of several gigabytes: converted in less memory than half of it, and no bit changes; loaded by two
processes, neither of which ever holds the whole.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from processes import start

from convert.hf_reader import HFReader
from convert.hf_writer import HFWriter, TensorPlan
from convert.names import entries
from nemojax.config import Config
from nemojax.hf_config import config_to_hf

REPOSITORY = Path(__file__).parents[2]
LIMIT = 2.0e9
DISK = 15e9
# The widths of Nano.
CONFIG = Config(
    pattern="MEM*EME",
    vocab_size=8192,
    hidden_size=2688,
    n_routed_experts=64,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
)
LARGEST = 2 * 64 * 1856 * 2688  # bytes of the largest parameter: the experts' `up_proj` of one layer
# ru_maxrss survives exec, so a child of a large test process would report its parent; a grandchild does not.
MEASURED = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, "-m", "nemojax", *sys.argv[1:]], stdout=subprocess.DEVNULL).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(peak * (1 if sys.platform == "darwin" else 1024))
sys.exit(code)
"""


def plan() -> list[TensorPlan]:
    bfloat16, float32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
    return [
        TensorPlan(name, float32 if "correction_bias" in name else bfloat16, entry.shape)
        for entry in entries(CONFIG)
        for name in entry.tensors
    ]


def write_checkpoint(directory: Path) -> int:
    """Fills every tensor from one block of random bytes, each from its own offset; returns the bytes written."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_to_hf(CONFIG)))
    tensors = plan()
    largest = max(tensor.nbytes for tensor in tensors)
    block = np.random.default_rng(0).integers(0, 256, largest + 64 * len(tensors), dtype=np.uint8)
    with HFWriter(directory, tensors, max_shard_bytes=1_500_000_000) as writer:
        for i, tensor in enumerate(tensors):
            content = block[64 * i : 64 * i + tensor.nbytes]
            writer.write(tensor.name, content.view(tensor.dtype).reshape(tensor.shape))
    return sum(tensor.nbytes for tensor in tensors)


def convert(source: Path, target: Path) -> int:
    """Runs the command in a process of its own; returns its peak resident memory in bytes."""
    start = time.monotonic()
    arguments = ["convert", "--no-progress", "--max-shard-gb", "1.5", str(source), str(target)]
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (0, "")
    peak = int(done.stdout)
    print(f"{source.name} -> {target.name}: peak {peak / 1e9:.2f} GB, {time.monotonic() - start:.0f} s")
    return peak


def differing(a: Path, b: Path) -> list[str]:
    with HFReader(a) as left, HFReader(b) as right:
        assert list(left) == list(right)
        return [
            name
            for name in left
            if left[name].dtype != right[name].dtype or left.read(name).tobytes() != right.read(name).tobytes()
        ]


def check_load(checkpoint: Path, nbytes: int) -> None:
    """Each process fills its own half of the devices, and beside them never holds more than two parameters.

    A half holds half of the experts, nine tenths of this checkpoint, and two copies of the rest.
    """
    for index, process in enumerate(start(checkpoint, "expert=4,tensor=2", out=None)):
        held, grown = process["held"], process["grown"]
        print(
            f"{checkpoint.name}, process {index}: holds {held / 1e9:.2f} GB, memory grew {grown / 1e9:.2f} GB at most"
        )
        assert 0.6 * nbytes < held < 0.7 * nbytes
        assert grown < held + 2 * LARGEST
        assert grown < 0.9 * nbytes


@pytest.mark.slow
def test_conversion_is_streamed(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    if free < DISK:
        pytest.skip(f"needs {DISK / 1e9:.0f} GB of disk, {free / 1e9:.1f} GB are free")
    try:
        nbytes = write_checkpoint(tmp_path / "hf")
        assert nbytes > 2 * LIMIT, "too small to show anything"
        peaks = [convert(tmp_path / "hf", tmp_path / "orbax"), convert(tmp_path / "orbax", tmp_path / "back")]
        assert differing(tmp_path / "hf", tmp_path / "back") == []
        assert max(peaks) < LIMIT
        for name in ("hf", "orbax"):
            check_load(tmp_path / name, nbytes)
    finally:
        for name in ("hf", "orbax", "back"):  # pytest keeps the directories of the last runs
            shutil.rmtree(tmp_path / name, ignore_errors=True)
