from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from proxytune import files, settings
from proxytune.errors import SettingsError
from proxytune.tasks import catalog

CONF = files.resource("conf")
FAMILIES = sorted(path.stem for path in (CONF / "family").glob("*.yaml"))
REAL = [name for name in FAMILIES if name != "tiny"]


def group(name: str) -> list[Path]:
    return sorted((CONF / name).glob("*.yaml"))


def composed(tmp_path: Path, *overrides: str) -> settings.Stage:
    """What Hydra makes of a root that takes the real groups."""
    from hydra import compose, initialize_config_dir

    root = f"defaults:\n  - family: tiny\n  - task: code\n  - data: auto\n  - _self_\nhydra:\n  searchpath: [file://{CONF}]\n"
    (tmp_path / "root.yaml").write_text(root)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        values = OmegaConf.to_container(compose("root", list(overrides)), resolve=True)
    return settings.load(settings.Stage, values)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_composes_and_every_base_of_it_can_be_chosen(tmp_path, name):
    family = composed(tmp_path, f"family={name}").family
    assert family.name == name and family.base in family.bases
    for base in family.bases:
        assert composed(tmp_path, f"family={name}", f"family.base={base}").family.base_ref == family.bases[base]


def test_the_promised_families_are_there():
    assert set(FAMILIES) >= {"tiny", "smollm2", "qwen2.5", "llama2", "llama3", "pythia", "gemma2"}


def test_the_tiny_family_needs_no_network(tmp_path):
    family = composed(tmp_path, "family=tiny").family
    assert family.data == "builtin"
    assert all(ref.model.startswith("embedded:") for ref in (family.small, *family.bases.values()))


@pytest.mark.parametrize("name", REAL)
def test_a_real_family_names_a_revision_of_each_model_and_takes_public_rows(tmp_path, name):
    family = composed(tmp_path, f"family={name}").family
    references = [family.small, *family.bases.values()]
    assert family.data == "hub" and all(ref.revision and ref.model.count("/") == 1 for ref in references)
    assert len({ref.model for ref in references}) == len(references), "a base is the small model itself"


def test_a_base_that_the_family_lacks_is_answered_with_those_it_has(tmp_path):
    with pytest.raises(SettingsError, match=r"family\.base=1\.8B.*did you mean '1\.7B'"):
        composed(tmp_path, "family=smollm2", "family.base=1.8B")


@pytest.mark.parametrize(
    "path", [*group("family"), *group("task"), *group("data")], ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_a_group_file_says_first_what_it_is_and_names_no_class(path):
    text = path.read_text()
    assert text.startswith("# ") and "_target_" not in text


def test_every_task_has_a_file_and_every_file_a_task(tmp_path):
    assert [path.stem for path in group("task")] == catalog.names()
    for name in catalog.names():
        assert composed(tmp_path, f"task={name}").task == settings.TaskChoice(name=name)


def test_every_source_has_a_file_with_every_key(tmp_path):
    assert {path.stem for path in group("data")} == {"auto", "builtin", "hub", "files"}
    for path in group("data"):
        assert set(OmegaConf.load(path)) == set(settings.Data.model_fields)
        assert composed(tmp_path, f"data={path.stem}").data == settings.Data(source=path.stem)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_defaults_are_fields_of_the_installed_trainer(tmp_path, name):
    from dataclasses import fields

    trainer = pytest.importorskip("transformers").TrainingArguments
    own = {"max_length"}  # TRL's, on top of the Trainer's
    assert set(composed(tmp_path, f"family={name}").family.training) <= {field.name for field in fields(trainer)} | own
