"""What is told of a trio's memory before it is loaded, against what then is loaded."""

from __future__ import annotations

import re

from proxytune.settings import DecodeStage
from proxytune.stages.shared import memory
from proxytune.stages.shared import trio as trios

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def told(text: str) -> dict[str, float]:
    """Bytes by part of the line."""
    found = re.findall(r"(base|small|adapter|expert|=)[^+=;]*? ([\d.]+) (B|kB|MB|GB)\b", text)
    return {part: float(number) * UNITS[unit] for part, number, unit in found}


def test_the_pair_is_told_as_one_small_model_and_an_adapter_and_takes_just_that(place, monkeypatch, capsys):
    from safetensors.torch import load_file

    settings = place.settings(DecodeStage)
    expert = trios.find(settings)
    trios._load.cache_clear()
    trio = trios.load(settings, expert, [])
    found = told(capsys.readouterr().err)
    small = trio.pairs[0][0].source
    assert small is trio.pairs[0][1].source
    weights = sum(p.nbytes for p in small.model.parameters())
    adapter = sum(t.nbytes for t in load_file(expert.folder / "adapter_model.safetensors").values())
    low = sum(a.nbytes + b.nbytes for m in small.model.modules() for a, b in getattr(m, "low", {}).values())
    assert abs(weights + low - found["small"] - found["adapter"]) < 0.02 * weights
    assert abs(low - adapter) <= 0.02 * adapter
    base = trio.base.source.model
    assert abs(sum(p.nbytes for p in base.parameters()) - found["base"]) < 0.02 * found["base"]
    assert abs(found["="] - found["base"] - found["small"] - found["adapter"]) < 0.02 * found["="]


def test_too_little_memory_is_told_before_anything_is_loaded(place, monkeypatch):
    settings = place.settings(DecodeStage)
    experts = (trios.files_of(trios.find(settings)),)
    assert "too little" not in memory.before(settings.base_ref, experts, "float32", served=False)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    assert "1 kB free on the cpu, which is too little" in memory.before(settings.base_ref, experts, "float32", False)


def test_a_base_behind_an_api_takes_none(place):
    settings = place.settings(DecodeStage)
    line = memory.before(settings.base_ref, (trios.files_of(trios.find(settings)),), "float32", served=True)
    assert "base" not in told(line) and told(line)["small"] > 0
