from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import proxytune
from proxytune.errors import DataError
from proxytune.files import read_json
from proxytune.settings import Tracker
from proxytune.tracking import record
from proxytune.tracking.plain import artifact_name, plain, safe_name, without_dots
from tests.tracking.surroundings import clean_environment


def start(outputs: Path, tracker: str = "local", **more):
    told = {
        "stage": "evaluate",
        "task": "code",
        "family": "tiny",
        "config": {"seed": 0},
        "command": "proxytune evaluate",
    }
    return record.start(Tracker(name=tracker), outputs, **told | more)


def told(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_local_record_holds_everything_and_no_wandb(tmp_path):
    picture = tmp_path / "curve.png"
    picture.write_bytes(b"png")
    with start(tmp_path, tags=["extra"], group="g") as run:
        assert told(run.folder)["status"] == "running"
        run.log({"train/loss": 1.5}, step=10)
        run.log({"note": 1})
        run.summary({"steered/loss": 1.0})
        run.summary({"base/loss": 2.0})
        run.table("a table", ["x", "y"], [(1, "a"), (2, None)])
        run.curve("alpha", ("alpha", "loss"), [(0, 2.0)], "t")
        run.image("alpha curve", picture)
        run.artifact("code@v1", "model", picture, {"k": 1}, uses=["rows"])
        run.use("rows", "dataset")
    assert re.fullmatch(r"evaluate-\d{8}-\d{6}-[0-9a-f]{4}", run.folder.name)
    kept = told(run.folder)
    assert kept["status"] == "finished" and kept["ended"] >= kept["started"]
    assert kept["summary"] == {"steered/loss": 1.0, "base/loss": 2.0}
    assert (kept["command"], kept["group"], kept["tags"]) == ("proxytune evaluate", "g", ["code", "tiny", "extra"])
    metrics = [{k: v for k, v in line.items() if k != "seconds"} for line in lines(run.folder / "metrics.jsonl")]
    assert metrics == [{"step": 10, "train/loss": 1.5}, {"note": 1}]
    assert lines(run.folder / "tables" / "a-table.jsonl") == [{"x": 1, "y": "a"}, {"x": 2, "y": None}]
    assert lines(run.folder / "tables" / "alpha.jsonl") == [{"alpha": 0, "loss": 2.0}]
    assert (run.folder / "images" / "alpha-curve.png").read_bytes() == b"png"
    made, used = lines(run.folder / "artifacts.jsonl")
    assert (made["how"], made["name"], made["uses"]) == ("made", "code@v1", ["rows"])
    assert (used["how"], used["name"]) == ("used", "rows")
    assert read_json(run.folder / "config.json") == {"seed": 0}
    assert not (tmp_path / "wandb").exists()


def test_tracker_none_keeps_run_json_alone(tmp_path):
    with start(tmp_path, "none") as run:
        run.log({"a": 1})
        run.summary({"a": 1})
        run.table("t", ["a"], [[1]])
        run.curve("c", ("a", "b"), [(1, 2)], "t")
        run.image("i", tmp_path / "nothing.png")
        run.artifact("x", "model", tmp_path)
        run.use("y", "dataset")
    assert [path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*")] == ["run.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    "error, status, text",
    [
        (DataError("row 3 is empty", "remove it"), "failed", "row 3 is empty (remove it)"),
        (KeyError("x"), "failed", "KeyError: 'x'"),
        (KeyboardInterrupt(), "interrupted", None),
    ],
)
def test_how_a_run_ended_is_recorded_and_the_error_goes_on(tmp_path, error, status, text):
    with pytest.raises(type(error)), start(tmp_path) as run:
        raise error
    assert (told(run.folder)["status"], told(run.folder).get("error")) == (status, text)


def test_a_killed_run_keeps_every_line_and_is_known_to_be_dead(tmp_path):
    program = (
        "import sys; from pathlib import Path; from tests.tracking.test_record import start\n"
        "with start(Path(sys.argv[1])) as run:\n"
        "    run.log({'a': 1}); run.log({'a': 2}); print(run.folder, flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env=clean_environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = Path(child.stdout.readline().strip())
    assert record.is_alive(folder)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert not record.is_alive(folder)
    assert [line["a"] for line in lines(folder / "metrics.jsonl")] == [1, 2]


def test_a_run_is_alive_until_its_block_ends(tmp_path):
    with start(tmp_path) as run:
        assert record.is_alive(run.folder)
    assert not record.is_alive(run.folder)


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    with start(tmp_path) as run:
        run.log({"loss": float("nan"), "top": np.float32("inf"), "n": np.int64(3), "x": np.float32(0.5)})
        run.summary({"loss": float("-inf")})
    (line,) = lines(run.folder / "metrics.jsonl")
    assert (line["loss"], line["top"], line["n"], line["x"]) == (None, None, 3, 0.5)
    assert told(run.folder)["summary"] == {"loss": None}


def test_plain_keeps_what_json_keeps_and_names_the_rest():
    assert plain({1: (True, None, Path("a/b")), "s": {"x"}}) == {"1": [True, None, "a/b"], "s": ["x"]}
    assert plain(True) is True


def test_names_are_made_safe():
    assert safe_name("alpha curve/№1") == "alpha-curve-1"
    assert safe_name("../..") == "unnamed"
    assert artifact_name("code@v3") == ("code", "local-v3")
    assert artifact_name("my rows") == ("my-rows", None)
    assert without_dots({"a.b": [{"c.d": "e.f"}]}) == {"a_b": [{"c_d": "e.f"}]}


def test_commit_is_that_of_our_checkout_only(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=t", "-c", "user.email=t@t")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    installed = tmp_path / "lib" / "proxytune" / "__init__.py"
    checkout = tmp_path / "proxytune" / "__init__.py"
    for path in (installed, checkout):
        path.parent.mkdir(parents=True)
        path.write_text("")
    git("init", "-q")
    git("add", "proxytune")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")

    def found(package: Path) -> str | None:
        monkeypatch.setattr(proxytune, "__file__", str(package))
        return record.code_version.__wrapped__()["commit"]

    assert found(checkout) == commit
    checkout.write_text("changed")
    assert found(checkout) == commit + "+dirty"
    assert found(installed) is None
