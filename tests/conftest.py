"""Settings of the whole test run: JAX on CPU, and every shape annotation of the library checked while it runs."""

import gc
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA's pool. JAX's interpreter of GPU kernels waits inside of some; on two cores that can be all, for ever.
os.environ.setdefault("NPROC", "16")

from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest

_ROOT = Path(__file__).parent.parent


def _checked_modules() -> list[str]:
    files = [path for package in ("nemojax", "pallas_kernels") for path in (_ROOT / package).rglob("*.py")]
    names = {".".join(path.relative_to(_ROOT).with_suffix("").parts) for path in files}
    return sorted(name for name in names if not name.endswith(("__init__", "__main__")))


# Meshes of up to eight devices, in this process only (an environment variable would reach the programs tests start).
jax.config.update("jax_num_cpu_devices", 8)

jaxtyping.install_import_hook(_checked_modules(), "beartype.beartype")

# Compilation makes one example slow whatever its size; the same examples in every run make a failure repeatable.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("searching", deadline=None)
hypothesis.settings.load_profile("repeatable")


# See the file.
_EXTENDED = tuple(
    line for line in (_ROOT / "tests/extended.txt").read_text().splitlines() if line and not line.startswith("#")
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.startswith(_EXTENDED):
            item.add_marker(pytest.mark.extended)
    # Files with slow tests begin first, or one of two workers would be at the last of them alone.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def annotations_off():
    """Lets a wrong argument through to the checks that a user meets, who runs without annotation checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def release_programs():
    """Frees the compiled programs of a test file: thousands of them exhaust the memory maps of a Linux process."""
    yield
    if tiny := sys.modules.get("tiny"):
        tiny.compiled.cache_clear()
    jax.clear_caches()
    gc.collect()
