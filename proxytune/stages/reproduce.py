"""Train a registered expert again from what its manifest says, and hold what comes out against it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxytune.errors import DataError, RegistryError, SettingsError, did_you_mean
from proxytune.experts.manifest import Manifest
from proxytune.experts.registry import Expert, Registry
from proxytune.settings import Expert as Settings
from proxytune.settings import load
from proxytune.stages import expert as training
from proxytune.stages.chain import Beginning
from proxytune.tasks.sources import Dataset
from proxytune.tracking import record

# What may differ from the run that is repeated: none of it decides what comes out, and rows are known by their hash.
FREE = ("data", "name", "outputs", "resume", "sample_steps", "threads", "tracker")


def run(reference: str, changes: Mapping[str, Any], command: str) -> Expert:
    """Register what the recipe of `reference` makes here and now, as a further version of its name.

    changes: settings under `FREE`. DataError or RegistryError before training where rows or models are others.
    """
    outputs = Path(str(changes.get("outputs", "outputs")))
    like = Registry(outputs / "registry").resolve(reference)
    settings = load(Settings, _values(like.manifest, changes) | {"outputs": outputs, "command": command})
    if settings.method.name not in training.METHODS:  # nothing of it would be held against the manifest
        raise RegistryError(
            f"the manifest of {like.reference} says method={settings.method.name}, which makes no single expert",
            f"only one that was tuned by {' or '.join(training.METHODS)} can be trained again",
        )
    now = record.code_version()
    if (now["version"], now["commit"]) != (like.manifest.code.version, like.manifest.code.commit):
        made = f"{like.manifest.code.version} at commit {like.manifest.code.commit}"
        print(f"proxytune: {like.reference} was made by proxytune {made}, which this is not", file=sys.stderr)
    made = training.run(settings, expect=lambda data, beginning: check(like.manifest, data, beginning))
    print(told(like, made))
    return made


def check(like: Manifest, data: Dataset, beginning: Beginning) -> None:
    """The rows and the models that a training is about to begin with must be those of the manifest."""
    named = f"{like.name}@v{like.version}"
    if data.fingerprints["train"] != like.data.fingerprint:
        counts = f"{len(data.rows['train']):,} train rows here, {like.data.train:,} there"
        raise DataError(f"the rows are not those of {named}: {counts}", "name the same rows: data=..., data.train=FILE")
    if not beginning.anti.same_model(like.anti):
        raise RegistryError(
            f"{like.anti.model} is not the checkpoint that {named} was tuned from: its hashes differ",
            "pin the revision that the manifest names, or bring that very folder",
        )
    if [ancestor.files for ancestor in beginning.lineage] != [ancestor.files for ancestor in like.lineage]:
        raise RegistryError(f"the experts that {named} goes back to are not these", "import the very ones first")


def told(like: Expert, made: Expert) -> str:
    """Whether both have the same weights, else how far apart they are."""
    weights = {name for name in made.manifest.files if name.endswith(".safetensors")}
    if all(made.manifest.files[name] == like.manifest.files.get(name) for name in weights):
        return f"the weights of {made.reference} are those of {like.reference}, byte for byte"
    from safetensors.torch import load_file

    apart = 0.0
    for name in weights:
        mine, theirs = load_file(made.folder / name), load_file(like.folder / name)
        if mine.keys() != theirs.keys() or any(mine[key].shape != theirs[key].shape for key in mine):
            return f"the weights of {made.reference} have another shape than those of {like.reference}"
        apart = max(apart, *(float((mine[key].double() - theirs[key].double()).abs().max()) for key in mine))
    return f"the weights of {made.reference} differ from those of {like.reference} by at most {apart:.3g}"


def _values(like: Manifest, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's settings with the user's changes; a word for a section is its name, as in tracker=none."""
    values: dict[str, Any] = {**like.config, "name": like.name}
    if like.origins:
        values["tracker"] = {}  # somebody else's project and team
    if like.lineage:
        values["from"] = like.lineage[-1].reference  # code@latest, say, means another one by now
    for key, change in changes.items():
        if key not in FREE:
            hint = did_you_mean(key, FREE) if key not in values else f"what may differ: {', '.join(FREE)}"
            raise SettingsError(f"--from-manifest repeats a recipe, and {key} would change it", hint)
        old = values.get(key)
        if isinstance(old, dict) and isinstance(change, str):
            change = {"name": change} if key != "data" else {"source": change}
        values[key] = {**old, **change} if isinstance(old, dict) and isinstance(change, dict) else change
    return values
