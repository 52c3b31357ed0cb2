"""Every test is offline, on one thread, on a plain terminal and without anybody's W&B account.

Set before a library reads it.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "MPLBACKEND": "agg",
    "NO_PROXY": "127.0.0.1,localhost,::1",
    "no_proxy": "127.0.0.1,localhost,::1",
}
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
    os.environ.pop(name, None)


# Else it would take examples from the constants of whichever modules tests before this one had imported.
providers._get_local_constants = lambda: providers._local_constants
# A slow example is a busy machine, not a failure. The same ones are drawn each time, so that nobody's change fails for
# what it has not touched; `make fuzz`, the long form of every test with examples, draws others.
settings.register_profile("short", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("fuzz", deadline=None, max_examples=1500)
settings.load_profile("short")


@pytest.fixture(autouse=True)
def no_rest_of_wandb():
    """An upload in a test's own process leaves variables, such as where W&B's process is, for later tests to use."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("WANDB")}
    yield
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        del os.environ[name]
    os.environ.update(kept)


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """A process that has imported everything, for what must run, or be killed, in a process of its own."""
    from tests.faults.warm import Warm

    started = Warm(tmp_path_factory.mktemp("warm"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def built_in():
    """Every task's built-in rows by split, made once, and the library read once: it takes seconds."""
    from functools import cache

    from proxytune.tasks import catalog, stdlib

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib, "functions", cache(stdlib.functions))
        yield {name: catalog.get(name).builtin() for name in catalog.names()}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("crash") and "PROXYTUNE_CRASH" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="long: make crash"))
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
