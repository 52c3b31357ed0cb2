"""Experts on the hub: its real client, against a stand-in for its server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pipelines import exits
from pipelines import registry as command_line
from proxytune.errors import RegistryError, SettingsError
from proxytune.experts import hub as hub_module
from proxytune.experts.card import card
from proxytune.experts.registry import Registry
from proxytune.models import online
from tests.experts.hub_server import TOKEN, Hub, as_the_hub
from tests.experts.test_archive import FILES, TENSORS, publish, told

REPO = "my-org/code-expert"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub() -> Generator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture
def command(hub, tmp_path, monkeypatch, capsys):
    """`proxytune registry ...` with the stand-in as its hub. Returns (exit code, stdout, stderr)."""

    def run(place: str, *arguments: str, token: str = TOKEN, url: str = hub.url, offline: bool = False):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(hub_module, "answers", lambda address: online.answers(address, 60))  # of a busy machine
        as_the_hub(monkeypatch, url, tmp_path / "cache" / place, offline)
        try:
            code, told = command_line.main([*arguments, "--outputs", str(tmp_path / place)]), ""
        except Exception as error:
            code, told = exits.of(error)
        return code, capsys.readouterr().out, told

    return run


@pytest.fixture
def registry(tmp_path) -> Registry:
    return Registry(tmp_path / "here" / "registry")


def one_line(told: str) -> str:
    (line,) = told.strip().splitlines()
    assert line.startswith("proxytune: ") and TOKEN not in line
    return line


def pushed(command, *more: str) -> str:
    """The commit that a push told of."""
    code, out, err = command("here", "push", "code@best", f"hub={REPO}", *more)
    assert (code, err) == (0, ""), err
    return re.search(r"revision=([0-9a-f]{40})$", out.strip())[1]


def test_a_push_and_a_pull_as_commands_of_their_own(registry, hub, tmp_path):
    publish(registry)
    known = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "cache")}
    known |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for place, line in (("here", f"push code hub={REPO} --public"), ("there", f"pull hub={REPO}")):
        arguments = [*line.split(), "--outputs", str(tmp_path / place)]
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", "registry", *arguments],
            cwd=ROOT,
            env=os.environ | known,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert Registry(tmp_path / "there" / "registry").resolve("code@v1")
    assert not hub.repos[REPO].private


def test_a_token_is_in_no_log_and_no_file_whatever_loggers_tell(registry, hub, tmp_path):
    publish(registry)
    known = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "cache"), "HF_DEBUG": "1"}
    known |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    loud = "import logging, sys; logging.basicConfig(level=logging.DEBUG); from pipelines import cli; "
    words = ["registry", "push", "code", f"hub={REPO}", "--outputs", str(tmp_path / "here")]
    done = subprocess.run(
        [sys.executable, "-c", loud + "sys.exit(cli.main(sys.argv[1:]))", *words],
        cwd=ROOT,
        env=os.environ | known,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "DEBUG:" in done.stderr and "authorization" in done.stderr.lower(), done.stderr
    assert TOKEN not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_what_is_pushed_is_pulled_whole_at_its_commit_and_at_no_other(registry, hub, command, tmp_path):
    first = registry.update(publish(registry), alpha=0.75)
    registry.tag("code@v1", "best")
    one = pushed(command)
    repo = hub.repos[REPO]
    assert repo.private and repo.tags == {"v1": one, "best": one} and repo.messages[-1] == "code@v1"
    assert repo.commits[one].keys() == {".gitattributes", "README.md", "manifest.json", *FILES}
    assert hub.blobs, "weights went as a large file"

    publish(registry, {"config.json": b"{}", "model.safetensors": TENSORS}, kind="full")
    registry.tag("code@v2", "best")
    two = pushed(command)
    assert repo.tags == {"v1": one, "v2": two, "best": two}
    assert repo.commits[two].keys() == {
        ".gitattributes",
        "README.md",
        "manifest.json",
        "config.json",
        "model.safetensors",
    }

    code, out, err = command("there", "pull", f"hub={REPO}", f"revision={one}")
    assert (code, err) == (0, "") and out == f"code@v1 is registered: code@v1 of hub:{REPO} at {one}\n"
    target = Registry(tmp_path / "there" / "registry")
    taken = target.resolve("code")
    target.verify(taken)
    assert {name: (taken.folder / name).read_bytes() for name in FILES} == FILES
    assert taken.manifest == first.manifest.model_copy(update={"origins": taken.manifest.origins})
    (origin,) = taken.manifest.origins
    assert (origin.reference, origin.source, origin.revision) == ("code@v1", f"hub:{REPO}", one)

    code, out, _ = command("there", "pull", f"hub={REPO}", "--name", "other")
    assert code == 0 and out == f"other@v1 is registered: code@v2 of hub:{REPO} at {two}\n"


def test_what_the_hub_gives_must_be_what_the_manifest_lists(registry, hub, command, tmp_path):
    registry.tag(publish(registry).reference, "best")
    good = pushed(command)
    repo = hub.repos[REPO]
    whole = repo.commits[good]
    changed = bytearray(TENSORS)
    changed[-1] ^= 1
    poisoned = {
        "its content changed": whole | {"adapter_model.safetensors": bytes(changed)},
        "has 3 bytes, not the 29": whole | {"adapter_config.json": b"{ }"},
        "adapter_config.json is missing": {k: v for k, v in whole.items() if k != "adapter_config.json"},
        "has no manifest.json": {k: v for k, v in whole.items() if k != "manifest.json"},
        "is not a plain file name": whole | {"manifest.json": told({"../evil.json": b"{}"}), "../evil.json": b"{}"},
        "is not of a kind": whole | {"manifest.json": told({"model.bin": b"{}"}), "model.bin": b"{}"},
    }
    target = Registry(tmp_path / "there" / "registry")
    for said, files in poisoned.items():
        commit = repo.commit(files, said)
        code, out, err = command("there", "pull", f"hub={REPO}", f"revision={commit}")
        assert code == RegistryError.exit_code and out == "" and said in one_line(err)
        assert target.experts() == [] and not [p for p in tmp_path.rglob("evil.json")]
        assert not [p for p in target.root.rglob("*") if p.is_file() and p.name != ".lock"]


def test_a_pull_that_was_cut_goes_on_from_what_it_has(registry, hub, command):
    registry.tag(publish(registry).reference, "best")
    commit = pushed(command)
    last = hub.repos[REPO].commits[commit].pop("part/chat_template.jinja")
    assert command("there", "pull", f"hub={REPO}", f"revision={commit}")[0] == RegistryError.exit_code
    hub.repos[REPO].commits[commit]["part/chat_template.jinja"] = last
    hub.seen.clear()
    assert command("there", "pull", f"hub={REPO}", f"revision={commit}")[0] == 0
    assert f"GET /{REPO}/resolve/{commit}/manifest.json" not in hub.seen, "it was fetched before"
    assert f"GET /{REPO}/resolve/{commit}/part/chat_template.jinja" in hub.seen


def test_what_goes_wrong_at_the_hub_is_one_line(registry, hub, command):
    registry.tag(publish(registry).reference, "best")
    pushed(command)
    hub.repos[REPO].private = True
    cases = [
        (("push", "code@best", f"hub={REPO}"), {"token": "hf_wrong"}, "hf auth login"),
        (("pull", f"hub={REPO}"), {"token": "hf_wrong"}, f"shows no {REPO}"),
        (("pull", "hub=my-org/nothing"), {}, "shows no my-org/nothing"),
        (("pull", f"hub={REPO}", "revision=nowhere"), {}, "has no such revision"),
        (("pull", f"hub={REPO}"), {"url": "http://127.0.0.1:9"}, "http://127.0.0.1:9 does not answer"),
        (("pull", f"hub={REPO}"), {"offline": True}, "offline mode is on"),
        (("pull", "hub=a/b/c"), {}, "give it as organisation/name"),
    ]
    for arguments, changes, said in cases:
        code, out, err = command("here", *arguments, **changes)
        assert code == RegistryError.exit_code and out == "", err
        assert said in one_line(err), arguments
    hub.refusal = ("/api/repos/create", 500)
    code, _, err = command("here", "push", "code@best", f"hub={REPO}")
    assert code == RegistryError.exit_code and "HTTP 500" in one_line(err)


def test_an_upload_that_fails_is_one_line_and_leaves_the_repository_as_it_was(registry, hub, command, monkeypatch):
    waits = []  # of the hub's client, between its tries
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=waits.append))
    registry.tag(publish(registry).reference, "best")
    hub.refusal = ("/lfs/", 500)
    code, _, err = command("here", "push", "code@best", f"hub={REPO}")
    assert code == RegistryError.exit_code and "run it again" in one_line(err) and len(waits) > 1
    assert hub.repos[REPO].messages == ["initial commit"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pull", "revision=abc"], "hub= is missing"),
        (["pull", "hub="], "hub needs a value"),
        (["pull", "hub=a/b", "revison=c"], "did you mean 'revision'"),
        (["push", "code", "hub=a/b", "revision=c"], "unknown key 'revision'"),
    ],
)
def test_a_slip_in_the_words_is_told(registry, arguments, said):
    publish(registry)
    with pytest.raises(SettingsError, match=re.escape(said)):
        command_line.main([*arguments, "--outputs", str(registry.root.parent)])


ROWS = [
    {"system": "base", "alpha": None, "n": 600, "loss": 2.5, "loss_ci": [2.4, 2.6], "metric": 0.0, "metric_ci": None},
    {"system": "steered", "alpha": 0.75, "n": 600, "loss": 0.25, "loss_ci": None, "metric": None, "metric_ci": None},
]


def test_the_card_says_what_the_manifest_knows(registry):
    expert = registry.update(
        publish(registry, config={"seed": 7, "method": {"name": "sft", "learning_rate": 1e-4, "optim": None}}),
        alpha=0.75,
        scores={
            "test": {"loss": 0.25, "base": "embedded:base", "table": [row | {"metric_name": "edit"} for row in ROWS]},
            "selection": {"by": "loss", "n": 50, "base": "embedded:base", "curve": [[0.0, 2.5, None], [0.75, 0.25, 1]]},
        },
    )
    text = card(expert, REPO)
    _, head, body = text.split("---\n", 2)
    assert set(yaml.safe_load(head)["tags"]) >= {"proxy-tuning", "code", "lora"}
    assert "base_model" not in yaml.safe_load(head), "an embedded model is not on the hub"
    for fact in (
        "`embedded:small`", "a" * 64, "b" * 64, "c" * 64, "900 train", "sft learning_rate=0.0001", "- seed: 7",
        "| base | - | 600 | 2.5 [2.4, 2.6] | 0 |", "| steered | 0.75 | 600 | 0.25 | - |", "| 0.75 | 0.25 | 1 |",
        f"pull hub={REPO}", "## Limits", "alpha=0.75", expert.manifest.command,
    ):  # fmt: skip
        assert fact in body, fact


def test_the_card_of_a_bare_expert_has_no_empty_tables_and_names_a_hub_model(registry):
    anti = {"model": "org/small", "revision": "main", "weights": "a" * 64, "tokenizer": "b" * 64}
    text = card(publish(registry, anti=anti), REPO)
    assert yaml.safe_load(text.split("---\n", 2)[1])["base_model"] == "org/small"
    assert "|" not in text.split("---\n", 2)[2] and "at revision `main`" in text
