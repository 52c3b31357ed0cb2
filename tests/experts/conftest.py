from __future__ import annotations

import pytest

from proxytune.settings import ModelRef
from tests.models.tiny_family import save_llama


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> ModelRef:
    return ModelRef(model=str(save_llama(tmp_path_factory.mktemp("models") / "small", seed=1)))
