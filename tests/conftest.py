"""Every test is offline, on one thread, and without anybody's W&B account. Set before a library reads it."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "MPLBACKEND": "agg",
}


# A slow example is a busy machine, not a failure. `make fuzz` is the long form of every test with examples.
settings.register_profile("short", deadline=None, max_examples=25)
settings.register_profile("fuzz", deadline=None, max_examples=1500)
settings.load_profile("short")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
