"""The house's own rules, held by tests where a tool does not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("pipelines", "proxytune") for path in (ROOT / folder).rglob("*.py"))


def test_imports_run_downward_only():
    program = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))"
    linted = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_a_room_that_imports_upward_breaks_the_contract(tmp_path):
    for folder in ("pipelines", "proxytune"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "proxytune" / "steering" / "climber.py").write_text("from proxytune.stages import expert\n")
    program = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))"
    linted = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {program}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert linted.returncode == 1 and "proxytune.steering.climber" in linted.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_not_called_utils(path):
    assert len(path.read_text("utf-8").splitlines()) <= 400
    assert path.stem not in ("utils", "helpers", "misc", "common")


def test_light_rooms_import_no_torch():
    light = ["proxytune.settings", "proxytune.errors", "proxytune.files", "proxytune.tasks.catalog", "pipelines.launch"]
    program = f"import sys, {', '.join(light)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "trl", "wandb", "matplotlib"} & set(loaded.stdout.split())


def test_configuration_names_no_python():
    assert [file for file in (ROOT / "conf").rglob("*.yaml") if "_target_" in file.read_text("utf-8")] == []


def test_every_make_target_has_help():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))
    listed = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    assert targets == set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split())
    for target in targets:
        assert re.search(rf"^  make {target} +\w", listed, flags=re.MULTILINE), target


def test_every_make_target_sets_up_first_what_is_missing(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    named = (
        "demo",
        "expert",
        "doctor",
        "serve",
        "decode",
        "evaluate",
        "sweep",
        "analyze",
        "report",
        "score",
        "registry",
        "sync",
        "twin",
        "bench",
        "pretrain",
    )
    for target in (*named, "test", "check"):
        planned = subprocess.run(
            ["make", "-n", "-C", str(tmp_path), target], env=environment, capture_output=True, text=True, check=True
        )
        assert "pip install" in planned.stdout, target


def test_every_package_is_in_the_wheel_s_list():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}
    assert set(listed) == folders | {"proxytune.conf", "proxytune.data"}
    assert [folder for folder in folders if not (ROOT / folder.replace(".", "/") / "__init__.py").exists()] == []


def test_a_wheel_works_from_another_folder(tmp_path):
    """Built, unpacked and run outside the clone: conf/ and data/ travel inside the package."""
    clone, site, elsewhere = (tmp_path / name for name in ("clone", "site", "elsewhere"))
    for folder in ("conf", "data", "pipelines", "proxytune"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, clone)
    build = "import setuptools.build_meta as b; print(b.build_wheel('.'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=clone, capture_output=True, text=True, check=True)
    zipfile.ZipFile(clone / built.stdout.splitlines()[-1]).extractall(site)
    elsewhere.mkdir()
    shown = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "expert", "task=math", "--cfg", "job"],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert "name: math" in shown.stdout
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "data" / "tiny").rglob("*") if path.is_file()}
    assert {str(path.relative_to(site / "proxytune")) for path in (site / "proxytune" / "data").rglob("*.*")} == shipped
