"""What a user may get wrong: one line that names it, the exit code of its kind, nothing written, no traceback.

In process, where a command line would do the same; tests/test_cli.py has what Hydra refuses.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli, exits
from proxytune import settings
from proxytune.errors import ProxytuneError
from tests.test_cli import KINDS, compose

ROOT = Path(__file__).resolve().parents[2]
NAN, INFINITY = float("nan"), float("inf")

# stage, key, values that do not hold
VALUES: list[tuple[str, str, list[Any]]] = [
    ("evaluate", "alpha", [NAN, INFINITY, -INFINITY, "much", [1]]),
    ("evaluate", "alphas", [["x"], [NAN], "0,1", 3]),
    ("evaluate", "bootstrap_samples", [0, -1, "many", 1.5]),
    ("evaluate", "score_batch_size", [0, "x"]),
    ("evaluate", "threads", [-1, "two"]),
    ("evaluate", "seed", ["x", 1.5, None, -1, 2**32]),
    ("evaluate", "split", ["train", ""]),
    ("evaluate", "generate", ["perhaps", 7]),
    ("evaluate", "outputs", [3, None]),
    ("evaluate", "decode.temperature", [-1, NAN, INFINITY, "hot", 1e-40, 1e300]),
    ("evaluate", "decode.top_k", [-1, 0.5, 2**63]),
    ("evaluate", "decode.seed", [2**63, -(2**63), 0.5]),
    ("evaluate", "decode.top_p", [0, 1.5, NAN]),
    ("evaluate", "decode.min_p", [-0.1, 2]),
    ("evaluate", "decode.repetition_penalty", [0, -1, INFINITY, 1e300, 1e-300]),
    ("evaluate", "decode.max_new_tokens", [0, -4, "all"]),
    ("evaluate", "decode.batch_size", [0]),
    ("evaluate", "decode.drafter", ["magic"]),
    ("evaluate", "decode.draft_tokens", [33, -1]),
    ("evaluate", "decode.alpha_by", ["whim"]),
    ("evaluate", "decode.alpha_steps", [0, 2**63]),
    ("evaluate", "tracker.name", ["mlflow"]),
    ("evaluate", "tracker.tags", ["one"]),
    ("evaluate", "data.source", ["web"]),
    ("evaluate", "data.limit_train", [0, -5, "few"]),
    ("evaluate", "family.base", ["nope"]),
    ("evaluate", "family.dtype", ["float8", "int"]),
    ("evaluate", "family.small", [{}, {"model": "x", "revison": "y"}, 5]),
    ("evaluate", "task.max_new_tokens", [0]),
    ("evaluate", "task.stop", ["end"]),
    ("evaluate", "base_model", [5, {"revision": "main"}]),
    ("evaluate", "steering", [[{"alpha": 1}], [{"expert": "a"}, {"alpha": 2}], "a@best", 0.5, {"a": 1}]),
    ("expert", "model", ["large"]),
    ("expert", "peft.r", [0, "wide"]),
    ("expert", "peft.lora_alpha", [0, NAN]),
    ("expert", "peft.lora_dropout", [1, -0.1]),
    ("expert", "peft.name", ["ia3"]),
    ("expert", "resume", ["maybe"]),
    ("sweep", "alphas", [[], [INFINITY]]),
    ("sweep", "select", ["luck"]),
    ("serve", "port", [70000, -1, "http"]),
    ("serve", "queue", [-1]),
    ("serve", "max_tokens", [0]),
    ("serve", "drain_seconds", [-1, INFINITY]),
    ("doctor", "rows", [1]),
    ("twin", "layers", [0, "half"]),
    ("twin", "held_out", [0, 1]),
    ("twin", "window", [4]),
    ("twin", "heal.steps", [-1]),
    ("twin", "heal.learning_rate", [0]),
    ("bench", "batch_sizes", [[], [0]]),
    ("bench", "acceptances", [[2]]),
    ("bench", "trio", ["huge"]),
    ("pretrain", "resume", ["later"]),
]
CASES = [(stage, key, value) for stage, key, values in VALUES for value in values]

ROWS = {  # what a file of rows may hold instead
    "nothing": "",
    "blank lines": "\n\n\n",
    "no JSON": "hello\n",
    "half a row": '{"prompt": "a", "comple\n',
    "a number": "5\n",
    "a list": '["a", "b"]\n',
    "no completion": '{"prompt": "a"}\n',
    "no prompt": '{"completion": "b"}\n',
    "a number for a prompt": '{"prompt": 3, "completion": "b"}\n',
    "null for a completion": '{"prompt": "a", "completion": null}\n',
    "messages without a role": '{"messages": [{"content": "a"}]}\n',
    "messages that are text": '{"messages": "a"}\n',
    "no messages": '{"messages": []}\n',
    "one broken row of two": '{"prompt": "a", "completion": " b"}\n{"prompt": }\n',
}

REGISTRY = [
    (["show", "nobody"], 6),
    (["show", "no body"], 6),
    (["show", "../../etc/passwd"], 6),
    (["show"], 2),
    (["tag", "nobody", "best"], 6),
    (["tag", "nobody"], 2),
    (["remove", "nobody@v1"], 6),
    (["remove", ""], 6),
    (["list", "--josn"], 2),
    (["lst"], 2),
    ([], 2),
]

OUT = ["", "/dev/null", "/dev/stdout", "/"]

MODELS = [
    "no-such-org/no-such-model",
    "/nowhere/at/all",
    "embedded:huge",
    "",
    "a b/c d",
    "../..",
    "org/name/more",
    "x" * 300,
]


@functools.cache
def composed(stage: str) -> dict[str, Any]:
    return compose(stage)


def one_line(error: BaseException, code: int) -> str:
    failure = exits.of(error)
    assert failure.code == code and len(failure.text.splitlines()) == 1, failure.text
    assert failure.text.startswith("proxytune: ") and len(failure.text) < 1000
    return failure.text


@pytest.fixture(scope="session")
def imported() -> None:
    """What is imported once, and takes seconds, is nobody's slip."""
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from proxytune.models import loading  # noqa: F401


@pytest.fixture(autouse=True)
def quick_and_leaving_nothing(imported, request, tmp_path_factory, monkeypatch):
    """Every test here: under 2 s of its own thread, and nothing in the folder that the command is given in."""
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    composed(request.node.callspec.params.get("stage", "evaluate") if hasattr(request.node, "callspec") else "evaluate")
    began = time.thread_time()
    yield
    assert time.thread_time() - began < 2
    assert not os.listdir(here)


@pytest.mark.parametrize(("stage", "key", "value"), CASES, ids=lambda value: str(value)[:40])
def test_a_setting_that_does_not_hold_is_named(stage, key, value):
    values = copy.deepcopy(composed(stage))
    *path, last = key.split(".")
    functools.reduce(lambda part, name: part[name], path, values)[last] = value
    with pytest.raises(ProxytuneError) as refused:
        settings.load(KINDS[stage], values)
    assert last in one_line(refused.value, 2)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_that_are_none_are_named_with_their_file(kind, suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    path.write_text(ROWS[kind])
    assert str(path) in one_line(_reading(path), 3)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80" * 40, b"a,b\n1,2\n", b""], ids=repr)
def test_a_table_or_bytes_that_are_no_rows_are_named(content, tmp_path):
    for suffix in (".csv", ".jsonl"):
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(content)
        assert str(path) in one_line(_reading(path), 3)


@pytest.mark.parametrize("name", ["absent.jsonl", "folder.jsonl", "rows.xlsx", "rows"])
def test_a_file_that_cannot_be_rows_is_named(name, tmp_path):
    if name == "folder.jsonl":
        (tmp_path / name).mkdir()
    if name.startswith("rows"):
        (tmp_path / name).write_text("x")
    error = _reading(tmp_path / name)
    assert name in one_line(error, exits.of(error).code) and exits.of(error).code in (2, 3)


def _reading(path: Path) -> ProxytuneError:
    from proxytune.tasks import catalog, rowfiles

    with pytest.raises(ProxytuneError) as refused:
        rowfiles.read(settings.Data(source="files", train=str(path)), catalog.get("qa"))
    return refused.value


@pytest.mark.parametrize(
    "row", ["5", "{}", '{"prompt": ""}', '{"prompt": 3}', '{"messages": [{}]}', '{"messages": 5}', "[", ""], ids=repr
)
def test_a_prompt_that_is_none_is_named(row, tmp_path):
    from proxytune.stages.decode import read_prompts

    path = tmp_path / "prompts.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(ProxytuneError) as refused:
        read_prompts(None, str(path))
    assert str(path) in one_line(refused.value, 3)


@pytest.mark.parametrize(("arguments", "code"), REGISTRY, ids=lambda value: repr(value))
def test_a_slip_with_the_registry_is_one_line(arguments, code, capsys):
    assert cli.main(["registry", *arguments]) == code
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1


@pytest.mark.parametrize("out", OUT, ids=repr)
@pytest.mark.parametrize(
    "arguments",
    [["score", "benchmark=gsm8k", "predictions=absent", "out="], ["compare", "a", "--out"], ["report", "a", "--out"]],
    ids=lambda arguments: arguments[0],
)
def test_an_out_that_can_be_no_file_is_refused_before_anything_is_read(arguments, out, capsys):
    *given, last = arguments
    assert cli.main([*given, *([last + out] if last.endswith("=") else [last, out])]) == 7
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and f"cannot write {Path(out)}" in told.err


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model[:30])
def test_a_model_that_is_not_there_is_named(model):
    from proxytune.models.loading import load_tokenizer

    with pytest.raises(ProxytuneError) as refused:
        load_tokenizer(settings.ModelRef(model=model))
    assert model[:200] in one_line(refused.value, 4)


@pytest.mark.parametrize(
    "files",
    [{}, {"config.json": "{"}, {"config.json": "{}"}, {"config.json": json.dumps({"model_type": "no-such-type"})}],
    ids=["empty", "cut", "untyped", "unknown"],
)
def test_a_folder_that_is_no_model_is_named(files, tmp_path):
    from proxytune.models.loading import load_model

    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ProxytuneError) as refused:
        load_model(settings.ModelRef(model=str(tmp_path)))
    assert str(tmp_path) in one_line(refused.value, 4)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["evaluate", "alpha=nan"], 2),
        (["decode", "promt=a"], 2),
        (["sweep", "task=nope"], 2),
        (["exprt"], 2),
        (["registry", "show", "nobody"], 6),
        (["score", "benchmark=gsm8k", "predictions=absent.jsonl"], 3),
        (["decode", "expert=nobody@v1", "prompt=a"], 6),
        (["report", "no/such/run"], 3),
        (["score", "benchmark=gsm8k", "predictions=absent.jsonl", "out=/dev/null"], 7),
        (["compare", "a", "b", "--out", "/"], 7),
        (["expert", "--from-manifest", ""], 6),
        (["expert", "--from-manifest", "code", "--cfg", "job"], 2),
        (["decode", "--config-dir", "absent", "prompt=a"], 2),
        (["evaluate", "steering.expert=code@best"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_whole_command_line_that_fails_takes_less_than_two_seconds(arguments, code):
    """From the start of the interpreter to its end, of a processor; a busy machine is given three tries."""

    def seconds() -> float:
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        after = os.times()
        assert done.returncode == code and len(done.stderr.splitlines()) == 1 and done.stdout == "", done.stderr
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert any(seconds() < 2 for _ in range(3))


def test_there_are_enough_cases():
    fixed = 2 * len(ROWS) + 4 + 4 + 8 + len(REGISTRY) + 3 * len(OUT) + len(MODELS) + 4 + 14
    assert len(CASES) + fixed >= 120
