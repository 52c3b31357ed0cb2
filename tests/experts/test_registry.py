"""The registry, with real folders, real locks and real processes that are killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import registry as command_line
from proxytune.errors import ProxytuneError, RegistryError, SettingsError
from proxytune.experts.manifest import CodeVersion, DataLineage, Manifest
from proxytune.experts.registry import Expert, Registry, check_name, check_tag
from proxytune.models.identity import ModelId

# What every process of the tests that need several does: write a small model and publish it.
PREAMBLE = """
import contextlib, os, signal, sys, time
from pathlib import Path
from proxytune.experts.manifest import Manifest
from proxytune.experts.registry import Registry

registry = Registry(Path(sys.argv[1]))
draft = Manifest.model_validate_json(sys.argv[2])

def publish(content):
    with registry.staging() as folder:
        (folder / "part").mkdir()
        (folder / "model.safetensors").write_text(content)
        (folder / "part" / "tokenizer.json").write_text(content * 100)
        return registry.publish(folder, draft)

def child(job, *given):
    pid = os.fork()
    if pid == 0:
        try:
            job(*given)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid
"""

CROWD = """
def write(writer):
    for turn in range(5):
        publish(f"{writer}.{turn}")

def read():
    seen = 0
    while seen < 20:
        experts = registry.experts()
        assert len(experts) >= seen, "a version vanished"
        seen = len(experts)
        if experts:
            registry.verify(registry.resolve("code"))
            registry.verify(experts[-1])

children = [child(read) for _ in range(2)] + [child(write, n) for n in range(4)]
sys.exit(sum(os.waitpid(pid, 0)[1] != 0 for pid in children))
"""

# The audit hook sees every open, rename, mkdir, chmod and lock: the k-th child dies just before its k-th of them.
KILLED = """
def doomed(k):
    left = k
    def hook(event, args):
        nonlocal left
        if event.startswith(("open", "os.", "fcntl.", "shutil.", "tempfile.")) and event != "os.kill":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    publish(f"killed at {k}")

kills = 0
while os.WIFSIGNALED(os.waitpid(child(doomed, kills), 0)[1]):
    kills += 1
    for expert in registry.experts():
        registry.verify(expert)
print(kills)
"""


def draft(**changes: Any) -> Manifest:
    about: dict[str, Any] = {
        "name": "code",
        "task": "code",
        "family": "tiny",
        "role": "expert",
        "kind": "lora",
        "anti": ModelId(model="embedded:small", revision=None, weights="a" * 64, tokenizer="b" * 64),
        "data": DataLineage(source="builtin", fingerprint="c" * 64, train=900, validation=300, test=600),
        "prompt_format": "plain",
        "config": {"seed": 0, "method": {"name": "sft", "learning_rate": 2e-4}},
        "code": CodeVersion(version="0.1.0", commit="d" * 40),
        "command": "proxytune expert task=code",
        "training": {"loss": 1.25, "steps": 60, "seconds": 12.5},
    }
    return Manifest(**(about | changes))


def publish(registry: Registry, **changes: Any) -> Expert:
    with registry.staging() as folder:
        (folder / "part").mkdir()
        (folder / "model.safetensors").write_bytes(bytes(range(256)))
        (folder / "part" / "tokenizer.json").write_text("{}")
        (folder / "model.safetensors").chmod(0o600)
        return registry.publish(folder, draft(**changes))


def refusal(kind: type[ProxytuneError], call, *given, **named) -> str:
    with pytest.raises(kind) as caught:
        call(*given, **named)
    message = str(caught.value)
    assert message.splitlines() == [message], "an error is one line"
    return message


def run(program: str, root: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", PREAMBLE + program, str(root), draft().model_dump_json()]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "outputs" / "registry")


def test_what_is_published_is_found_under_every_reference(registry):
    first, second = publish(registry), publish(registry)
    registry.tag("code@v1", "best")
    registry.tag("code@best", "paper-1")
    for reference in ("code", "code@latest", "code@v2"):
        assert registry.resolve(reference) == second
    for reference in ("code@v1", "code@best", "code@paper-1"):
        assert registry.resolve(reference) == first
    assert registry.tags("code") == {"best": 1, "paper-1": 1, "latest": 2}
    assert sorted(second.manifest.files) == ["model.safetensors", "part/tokenizer.json"]
    registry.verify(second)


def test_experts_are_listed_by_name_then_number(registry):
    for name in ("math", *["code"] * 11):
        publish(registry, name=name)
    assert [expert.reference for expert in registry.experts()] == [*(f"code@v{n}" for n in range(1, 12)), "math@v1"]


def test_published_files_are_readable_to_all(registry):
    folder = publish(registry).folder
    modes = {path.relative_to(folder).as_posix(): path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}
    assert modes == {
        ".": 0o755,
        "part": 0o755,
        "model.safetensors": 0o644,
        "part/tokenizer.json": 0o644,
        "manifest.json": 0o644,
    }


def test_several_writers_lose_no_version_and_readers_see_no_part(registry):
    done = run(CROWD, registry.root)
    assert (done.returncode, done.stderr) == (0, "")
    experts = registry.experts()
    assert [expert.version for expert in experts] == list(range(1, 21))
    contents = {(expert.folder / "model.safetensors").read_text() for expert in experts}
    assert contents == {f"{writer}.{turn}" for writer in range(4) for turn in range(5)}


def test_a_writer_killed_at_any_moment_leaves_a_whole_version_or_none(registry):
    done = run(KILLED, registry.root)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 20, "too few moments were tried"
    whole = [(expert.folder / "model.safetensors").read_text() for expert in registry.experts()]
    assert f"killed at {int(done.stdout)}" in whole, "the one that was spared is there"
    assert len(whole) == len(set(whole))
    publish(registry)
    assert sorted(p.name for p in (registry.root / ".staging").iterdir()) == [".lock"], "the dead were cleared away"


def test_staging_of_a_living_writer_is_left_alone(registry):
    with registry.staging() as folder:
        (folder / "weights").write_text("slow to write")
        publish(registry)
        assert (folder / "weights").read_text() == "slow to write"
    assert not folder.exists()


def test_a_number_is_never_reused(registry):
    publish(registry), publish(registry)
    assert registry.remove("code@v2") == "code@v2"
    assert publish(registry).version == 3
    for version in (1, 3):
        registry.remove(f"code@v{version}")
    assert registry.experts() == [] and registry.names() == []
    assert publish(registry).version == 4
    (registry.root / "code" / "counter.json").unlink()
    assert publish(registry).version == 5


def test_a_tagged_version_is_removed_only_by_force_and_takes_its_tags_along(registry):
    publish(registry), publish(registry)
    registry.tag("code@v1", "best")
    assert "code@v1 is tagged best" in refusal(RegistryError, registry.remove, "code@best")
    assert registry.resolve("code@best").version == 1
    registry.remove("code@v1", force=True)
    assert registry.tags("code") == {"latest": 2}
    assert not (registry.root / "code" / "v1").exists()


def test_a_removal_that_is_killed_leaves_a_version_with_its_tags_or_none(registry, monkeypatch):
    publish(registry), publish(registry), publish(registry)
    registry.tag("code@v1", "best"), registry.tag("code@v2", "good")
    for step, tags in (("replace_folder", {"best": 1}), ("write_json", {"best": 1})):
        with monkeypatch.context() as patch:
            patch.setattr(f"proxytune.experts.registry.files.{step}", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                registry.remove("code@best", force=True)
        assert registry.tags("code") == tags | {"good": 2, "latest": 3}
    assert "code@best means v1, which is gone" in refusal(RegistryError, registry.remove, "code@best", force=True)
    registry.remove("code@good", force=True)
    assert registry.tags("code") == {"latest": 3}, "tags that a kill left are cleared by the next removal"


def test_a_tag_moves(registry):
    publish(registry), publish(registry)
    registry.tag("code@v1", "best")
    registry.tag("code", "best")
    assert registry.resolve("code@best").version == 2


def test_a_damaged_file_is_named(registry):
    expert = publish(registry)
    weights = expert.folder / "model.safetensors"
    weights.write_bytes(bytes(256))
    assert registry.resolve("code") == expert, "sizes alone do not tell"
    assert f"{weights} is not what was published" in refusal(RegistryError, registry.verify, expert)
    weights.write_bytes(b"short")
    assert f"{weights} has 5 bytes, not 256" in refusal(RegistryError, registry.resolve, "code")
    weights.unlink()
    assert f"{weights} is missing" in refusal(RegistryError, registry.resolve, "code")


@pytest.mark.parametrize("content", ["", '{"name": ', '{"name": "code"}', None])
def test_a_damaged_manifest_is_named_and_can_be_removed(registry, content):
    manifest = publish(registry).folder / "manifest.json"
    if content is None:
        manifest.unlink()
    else:
        manifest.write_text(content)
    for call in (registry.experts, lambda: registry.resolve("code")):
        assert f"code@v1 is damaged: {manifest}" in refusal(RegistryError, call)
    registry.remove("code@v1")
    assert registry.experts() == []


def test_a_folder_that_was_copied_by_hand_is_not_taken_for_a_version(registry):
    publish(registry).folder.rename(registry.root / "code" / "v7")
    assert "code@v7 is damaged: its manifest.json is that of code@v1" in refusal(RegistryError, registry.experts)


def test_update_keeps_everything_else(registry):
    before = publish(registry)
    registry.update(before, alpha=0.75, scores={"validation": {"loss": 1.5}})
    after = registry.update(before, scores={"test": {"loss": 1.25, "metric": float("nan")}})
    assert registry.resolve("code").manifest.alpha == after.manifest.alpha == 0.75
    scores = {"validation": {"loss": 1.5}, "test": {"loss": 1.25, "metric": None}}
    assert registry.resolve("code").manifest == before.manifest.model_copy(update={"alpha": 0.75, "scores": scores})
    registry.verify(after)


def test_nothing_but_whole_files_is_published(registry, tmp_path):
    with registry.staging() as folder:
        assert "holds no files" in refusal(RegistryError, registry.publish, folder, draft())
        (folder / "weights").symlink_to(tmp_path / "elsewhere")
        assert "is a link" in refusal(RegistryError, registry.publish, folder, draft())
    assert registry.experts() == []


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("cod", "no expert is named 'cod' (did you mean 'code'?)"),
        ("", "no expert is named ''"),
        ("../code", "no expert is named '../code'"),
        (".staging", "no expert is named '.staging'"),
        ("code@v9", "code has no version or tag 'v9' (did you mean"),
        ("code@v0", "code has no version or tag 'v0' (did you mean"),
        ("code@lastest", "(did you mean 'latest'?)"),
        ("code@1", "code has no version or tag '1' (did you mean 'v1'?)"),
        ("code@", "code has no version or tag '' (known: latest, v1)"),
        ("code@best", "code has no best version yet (run: proxytune sweep"),
        ("code@a\nb", "code has no version or tag"),
    ],
)
def test_an_unknown_reference_gets_one_line_with_a_suggestion(registry, reference, said):
    publish(registry)
    assert said in refusal(RegistryError, registry.resolve, reference)
    assert said in refusal(RegistryError, registry.tag, reference, "mine")


def test_an_empty_registry_says_how_to_begin_and_is_not_made_by_looking(registry):
    assert registry.experts() == []
    for call in (registry.resolve, registry.remove, lambda ref: registry.tag(ref, "mine")):
        assert "proxytune expert" in refusal(RegistryError, call, "code")
    assert not registry.root.exists()


words = st.text(max_size=120) | st.text("abzAZ019._-@/v\n ", max_size=8) | st.sampled_from(["latest", "v1", ".."])


@given(words)
def test_a_name_is_a_plain_file_name_or_is_refused(word):
    if re.fullmatch(r"[a-z0-9][a-z0-9._-]*", word) and len(word) <= 100:
        assert check_name(word) == word == os.path.basename(os.path.normpath(word))
        assert draft(name=word).name == word
    else:
        refusal(RegistryError, check_name, word)


@given(words)
def test_a_tag_is_never_mistaken_for_a_version(word):
    if re.fullmatch(r"[a-z][a-z0-9-]*", word) and word != "latest" and not re.fullmatch(r"v\d+", word):
        assert check_tag(word) == word
    else:
        refusal(RegistryError, check_tag, word)


@given(reference=words)
def test_any_reference_is_found_or_refused_in_one_line(tmp_path_factory, reference):
    registry = Registry(tmp_path_factory.getbasetemp() / "any" / "registry")
    if not registry.names():
        publish(registry, name="a")
    for given_ in (reference, f"a@{reference}"):
        if given_ in ("a", "a@latest", "a@v1"):
            assert registry.resolve(given_).version == 1
        else:
            refusal(RegistryError, registry.resolve, given_)


def test_the_commands_list_show_tag_and_remove(registry, capsys):
    def command(*arguments: str) -> str:
        assert command_line.main([*arguments, "--outputs", str(registry.root.parent)]) == 0
        return capsys.readouterr().out

    assert "proxytune expert" in command("list") and json.loads(command("list", "--json")) == []
    expert = registry.update(publish(registry), alpha=0.75, scores={"test": {"loss": 1.375}})
    assert command("tag", "code", "best") == "code@best now means code@v1\n"
    (row,) = [line for line in command("list").splitlines() if "code@v1" in line]
    shown = ("code@v1", "best, latest", "code", "tiny", "lora", "expert", "embedded:small", "0.75", "1.375")
    assert tuple(re.split(r"\s{2,}", row.strip())[:9]) == shown
    assert len(row.rstrip()) <= 100

    text = command("show", "code@best")
    for fact in ("a" * 64, "900 train", "method.learning_rate", expert.manifest.command, str(expert.folder), "0.75"):
        assert fact in text
    assert "None" not in text  # what is null says nothing
    (listed,) = json.loads(command("list", "--json"))
    assert json.loads(command("show", "code", "--json")) == listed
    assert listed["reference"] == "code@v1" and listed["tags"] == ["best", "latest"]
    assert Manifest.model_validate({k: v for k, v in listed.items() if k in Manifest.model_fields}) == expert.manifest

    assert "tagged best" in refusal(RegistryError, command, "remove", "code")
    assert command("remove", "code", "--force") == "code@v1 is removed\n"
    assert "did you mean" not in refusal(SettingsError, command_line.main, ["lst"])


def test_looking_at_the_registry_imports_no_torch(registry):
    publish(registry)
    program = (
        "import sys; from pipelines.registry import main; main(['show', 'code', '--outputs', sys.argv[1]]);"
        "sys.exit('torch' in sys.modules)"
    )
    arguments = [sys.executable, "-c", program, registry.root.parent]
    assert subprocess.run(arguments, stdout=subprocess.DEVNULL, check=False).returncode == 0
