from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from proxytune.models.loading import load_model
from proxytune.settings import Data, Decode, Expert, Family, Stage, Steering, TaskChoice, Tracker
from proxytune.stages import expert
from tests.models.tiny_family import save_family, tokenizer, write_rows
from tests.remote.server import Server

STEPS = {"name": "sft", "max_steps": 12, "eval_strategy": "no"}


@dataclass(frozen=True)
class Place:
    """A random family, rows in files, and an outputs folder whose registry has `qa` and the tuned base `qa-tuned`."""

    family: Family
    data: Data
    outputs: Path

    def settings(self, kind: type[Stage], **changes: Any):
        """Settings of a stage here: local record, replies of six tokens."""
        values: dict[str, Any] = {
            "family": self.family,
            "task": TaskChoice(name="qa"),
            "data": self.data,
            "tracker": Tracker(name="local"),
            "outputs": self.outputs,
            "command": "proxytune of a test",
        }
        if issubclass(kind, Steering):
            values |= {"expert": "qa", "decode": Decode(max_new_tokens=6)}
        return kind(**(values | changes))


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("trained")
    splits = {"train": (0, 40), "validation": (100, 8), "test": (200, 9)}
    files = {split: write_rows(folder / f"{split}.jsonl", *numbers) for split, numbers in splits.items()}
    place = Place(save_family(folder / "family"), Data(source="files", **files), folder / "outputs")
    for model in ("small", "base"):
        expert.run(place.settings(Expert, model=model, method=STEPS))
    return place


@pytest.fixture
def scarce(monkeypatch):
    """To be called: from then on a forward of more than so many rows finds no memory."""
    from transformers import LlamaForCausalLM

    whole = LlamaForCausalLM.forward

    def at_most(rows: int) -> None:
        def forward(self, *args, **kwargs):
            if len(kwargs["input_ids"]) > rows:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)

    return at_most


@pytest.fixture
def place(trained, tmp_path) -> Place:
    """The trained place with outputs of its own: nothing is measured there yet."""
    outputs = tmp_path / "outputs"
    shutil.copytree(trained.outputs / "registry", outputs / "registry")
    return replace(trained, outputs=outputs)


@pytest.fixture
def pictures() -> None:
    """For a test that looks at a picture: it is drawn to the end."""


@pytest.fixture(autouse=True)
def sketches(request, monkeypatch) -> None:
    """Panels are drawn into every picture, but pixels take longer than most stages here: they are left out."""
    if "pictures" in request.fixturenames:
        return
    from matplotlib.figure import Figure

    whole = Figure.savefig

    def savefig(self, file, *, format: str, **how):
        return file.write(b"a picture") if format == "png" else whole(self, file, format=format, **how)

    monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture(scope="module")
def base(trained):
    """What a server of the family's base computes."""
    net = load_model(trained.family.base_ref, "float32")
    return cache(lambda ids: net(torch.tensor([ids])).logits[0])


@pytest.fixture
def serving(base):
    def start(name: str, **abilities) -> Server:
        ids = tokenizer()
        texts = {i: ids.decode([i]) for i in range(2112)}
        texts = {i: f"bytes:{i}" if "\ufffd" in text or not text else text for i, text in texts.items()}
        return Server(name, lambda ids: base(tuple(ids)), ids, text=texts.__getitem__, **abilities)

    return start
