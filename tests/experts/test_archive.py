"""Experts as files: real archives, and archives made by hand that lie."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from pipelines import registry as command_line
from proxytune.errors import RegistryError, StorageError
from proxytune.experts import archive, intake
from proxytune.experts.registry import Expert, Registry
from proxytune.files import CHECK
from tests.experts.test_registry import draft

TENSORS = save({"a.weight": torch.arange(64.0)})
FILES = {
    "adapter_model.safetensors": TENSORS,
    "adapter_config.json": b'{"peft_type": "LORA", "r": 4}',
    "part/chat_template.jinja": b"{{ messages }}",
}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "here" / "registry")


@pytest.fixture
def target(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "there" / "registry")


def publish(registry: Registry, files: dict[str, bytes] = FILES, **changes: Any) -> Expert:
    with registry.staging() as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return registry.publish(folder, draft(**changes))


def told(listed: dict[str, bytes], **changes: Any) -> bytes:
    """A manifest that lists these files as they are."""
    entries = {n: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in listed.items()}
    return json.dumps(draft(version=3).model_dump(mode="json") | {"files": entries} | changes).encode()


def tar(path: Path, members: list[tuple[str, bytes]], *more: tarfile.TarInfo, form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        for member in more:
            file.addfile(member)
    return path


def refusal(registry: Registry, source: Path) -> str:
    """The one line that an import is refused with; nothing of it is left."""
    before = [expert.reference for expert in registry.experts()]
    with pytest.raises(RegistryError) as caught:
        archive.read(registry, source)
    assert [expert.reference for expert in registry.experts()] == before
    left = [path for path in registry.root.rglob("*") if path.is_file() and path.name != ".lock"]
    assert before or left == []
    assert str(caught.value).splitlines() == [str(caught.value)]
    return str(caught.value)


def test_an_exported_expert_is_imported_whole_under_a_new_number_and_remembers_where_it_came_from(
    registry, target, tmp_path
):
    first = registry.update(publish(registry), alpha=0.75, scores={"test": {"loss": 1.5}})
    publish(target), publish(target)
    file = archive.write(registry, first, tmp_path / "code.tar")
    taken = archive.read(target, file)
    assert taken.reference == "code@v3"
    target.verify(taken)
    assert {name: (taken.folder / name).read_bytes() for name in FILES} == FILES
    (origin,) = taken.manifest.origins
    assert (origin.reference, origin.source) == ("code@v1", "code.tar")
    assert origin.manifest == hashlib.sha256((first.folder / "manifest.json").read_bytes()).hexdigest()
    changed = {"version": 3, "origins": taken.manifest.origins}
    assert taken.manifest == first.manifest.model_copy(update=changed), "all else of the lineage is as it was"

    back = archive.read(registry, archive.write(target, taken, tmp_path / "back.tar"), name="code-again")
    assert back.reference == "code-again@v1"
    assert [origin.reference for origin in back.manifest.origins] == ["code@v1", "code@v3"]


def test_an_expert_always_makes_the_same_archive_and_any_tar_can_list_it(registry, tmp_path):
    expert = publish(registry)
    one, two = (archive.write(registry, expert, tmp_path / name) for name in ("one.tar", "two.tar"))
    assert one.read_bytes() == two.read_bytes()
    with tarfile.open(one) as file:
        assert file.getnames() == ["manifest.json", *sorted(FILES)]
        assert file.extractfile("adapter_model.safetensors").read() == TENSORS
    assert {path.name for path in tmp_path.iterdir()} == {"here", "one.tar", "two.tar"}


def test_a_damaged_expert_and_a_file_that_is_there_are_not_exported(registry, tmp_path):
    expert = publish(registry)
    (tmp_path / "kept.tar").write_text("mine")
    with pytest.raises(RegistryError, match="is there already"):
        archive.write(registry, expert, tmp_path / "kept.tar")
    (expert.folder / "adapter_config.json").write_bytes(b'{"peft_type": "LORA", "r": 8}')
    with pytest.raises(RegistryError, match="its content changed"):
        archive.write(registry, expert, tmp_path / "new.tar")
    assert {path.name for path in tmp_path.iterdir()} == {"here", "kept.tar"}


NAMES = [
    "../evil.json",
    "part/../../evil.json",
    "/etc/evil.json",
    "part//evil.json",
    "./evil.json",
    "",
    ".",
    "..",
    ".hidden.json",
    "C:\\evil.json",
    "part\\evil.json",
    "line\nbreak.json",
    "esc\x1b[2J.json",
    "x" * 101 + ".json",
    "manifest.json",
    "aliases",
    "training_args.bin",
    "model.pt",
    "model.pth",
    "model.pkl",
    "model.ckpt",
    "modeling_evil.py",
    "weights.h5",
    "weights.npy",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leaves_its_folder_or_could_run_is_refused(target, tmp_path, name):
    files = FILES | {name: b"{}"}
    source = tar(tmp_path / "evil.tar", [("manifest.json", told(files)), *files.items()])
    refusal(target, source)
    assert not (tmp_path / "evil.json").exists() and not (target.root.parent / "evil.json").exists()


def member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
        tarfile.CONTTYPE,
        tarfile.GNUTYPE_SPARSE,
        b"Z",
    ],
)
def test_links_devices_and_other_members_are_refused(target, tmp_path, kind):
    files = FILES | {"tokenizer.json": b"{}"}
    source = tar(
        tmp_path / "evil.tar",
        [("manifest.json", told(files)), *FILES.items()],
        member("tokenizer.json", kind, "/etc/passwd"),
    )
    assert "is no plain file" in refusal(target, source)


def test_extended_headers_are_refused(target, tmp_path):
    files = FILES | {"tokenizer.json": b"{}"}
    source = tmp_path / "evil.tar"
    with tarfile.open(source, "w", format=tarfile.PAX_FORMAT) as file:
        for name, content in [("manifest.json", told(files)), *files.items()]:
            made = tarfile.TarInfo(name)
            made.size, made.pax_headers = len(content), {"comment": "x" * 1000}
            file.addfile(made, io.BytesIO(content))
    assert "is no plain file" in refusal(target, source)


HEADER = (10**12).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", pickle.dumps({"a": 1}), "claims a header"),
        ("model.safetensors", HEADER + TENSORS[8:], "claims a header of 1,000,000,000,000 bytes"),
        ("model.safetensors", TENSORS[:-4], "not in the safetensors format"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]", "not in the safetensors format"),
        ("model.safetensors", b"short", "claims a header"),
        ("tokenizer.model", pickle.dumps({"a": 1}), "is a pickle"),
        ("config.json", b"PK\x03\x04" + b"zip of torch.save", "is a pickle or an archive"),
        ("config.json", b'{"a": ', "cannot be read"),
        ("config.json", b"[" * 200_000, "cannot be read"),
        ("chat_template.jinja", b"\xff\xfe", "cannot be read"),
    ],
)
def test_content_that_is_not_what_its_name_says_is_refused(target, tmp_path, name, content, said):
    files = FILES | {name: content}
    source = tar(tmp_path / "evil.tar", [("manifest.json", told(files)), *files.items()])
    assert said in refusal(target, source)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("lora", {"adapter_model.safetensors": None}, "is of the kind lora and has no adapter_model.safetensors"),
        ("lora", {"adapter_config.json": None}, "is of the kind lora and has no adapter_config.json"),
        ("lora", {"adapter_config.json": b'{"peft_type": "X"}'}, "is not that of a LoRA adapter"),
        ("lora", {"adapter_config.json": b'["LORA"]'}, "is not that of a LoRA adapter"),
        ("full", {"adapter_config.json": None}, "is of the kind full and has no config.json"),
        ("full", {"config.json": b"{}"}, "is of the kind full and has an adapter_config.json"),
    ],
)
def test_an_expert_is_of_the_kind_that_its_manifest_tells(target, tmp_path, kind, changes, said):
    """Where one is not, the libraries look elsewhere for the rest: another model, whatever the hashes say."""
    files = {name: content for name, content in (FILES | changes).items() if content is not None}
    source = tar(tmp_path / "evil.tar", [("manifest.json", told(files, kind=kind)), *files.items()])
    assert said in refusal(target, source)


def test_members_and_manifest_must_agree(target, tmp_path):
    manifest, members = ("manifest.json", told(FILES)), list(FILES.items())
    path = tmp_path / "evil.tar"
    cases = {
        "is not listed in its manifest": [manifest, *members, ("extra.json", b"{}")],
        "comes twice": [manifest, *members, members[0]],
        "is missing": [manifest, *members[:-1]],
        "content changed": [manifest, ("adapter_config.json", b'{"peft_type": "LORA", "r": 8}'), *members],
        "has 30 bytes, not what": [manifest, ("adapter_config.json", b'{"peft_type": "LORA", "r": 16}'), *members],
        "does not begin with a manifest.json": [*members, manifest],
    }
    for said, content in cases.items():
        assert said in refusal(target, tar(path, content)), said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "../code"}, "name"),
        ({"files": {}}, "lists 0 files"),
        ({"command": "proxytune \x1b[2J"}, "control characters"),
        ({"anti": {"model": "m"}}, "anti.revision"),
        ({"schema_version": 9}, "schema_version"),
        ({"unheard": 1}, "unheard"),
        ({"files": {"tokenizer.json": {"size": 10**12, "sha256": "a" * 64}}}, "more than the"),
        ({"files": {"tokenizer.json": {"size": -1, "sha256": "a" * 64}}}, "size"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused_before_anything_is_read(target, tmp_path, changes, said):
    source = tar(tmp_path / "evil.tar", [("manifest.json", told(FILES, **changes)), *FILES.items()])
    assert said in refusal(target, source)
    assert not target.root.exists()


@pytest.mark.parametrize("checked", [False, True])
def test_a_manifest_nested_without_end_is_refused(target, tmp_path, checked):
    head = '{"config": ' + "[" * 100_000 + "]" * 100_000 + ", "
    deep = head + f'"{CHECK}": "{zlib.crc32(head.encode()):08x}"}}' if checked else head.rstrip(", ") + "}"
    refusal(target, tar(tmp_path / "evil.tar", [("manifest.json", deep.encode())]))


def test_more_than_the_disk_holds_is_refused_before_anything_is_read(target, tmp_path):
    files = {"model.safetensors": {"size": 10**16, "sha256": "a" * 64}}
    source = tar(tmp_path / "evil.tar", [("manifest.json", told({}, files=files))])
    with pytest.raises(StorageError, match="takes 10,000,000"):
        archive.read(target, source)
    assert not target.root.exists()


@pytest.mark.parametrize("content", [b"", b"not an archive", bytes(1024), pickle.dumps([1] * 2000)])
def test_what_is_no_archive_is_refused(target, tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    refusal(target, tmp_path / "file")
    refusal(target, tmp_path)  # a folder
    refusal(target, tmp_path / "nowhere")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    registry = Registry(folder / "registry")
    return archive.write(registry, publish(registry), folder / "code.tar")


@given(data=st.data())
def test_an_archive_with_a_byte_changed_or_its_end_missing_is_refused_or_says_the_same(
    tmp_path_factory, exported, data
):
    whole = bytearray(exported.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1025))  # the last two blocks say no more than that it ends
    harmed = whole[:place]
    if data.draw(st.booleans()):
        harmed = whole.copy()
        harmed[place] ^= 1 << data.draw(st.integers(0, 7))
    folder = tmp_path_factory.mktemp("harmed")
    (folder / "code.tar").write_bytes(harmed)
    registry = Registry(folder / "registry")
    try:
        taken = archive.read(registry, folder / "code.tar")
    except RegistryError:
        assert registry.experts() == []
    else:  # the padding, or a letter of the manifest's free text
        assert {name: (taken.folder / name).read_bytes() for name in FILES} == FILES


def test_the_limits_of_a_name_are_those_of_a_tar_header():
    for length in (1, intake.NAME_BYTES - 5):
        intake.check_name("x" * length + ".json", "here")
    member = tarfile.TarInfo("x" * 95 + ".json")
    assert len(member.tobuf(tarfile.GNU_FORMAT)) == 512


def test_export_and_import_as_commands(registry, target, tmp_path, capsys):
    publish(registry)
    file = str(tmp_path / "code.tar")
    assert command_line.main(["export", "code@v1", file, "--outputs", str(registry.root.parent)]) == 0
    assert command_line.main(["import", file, "--name", "other", "--outputs", str(target.root.parent)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith(f"code@v1 is in {file}, ")
    assert out.splitlines()[1] == "other@v1 is registered: code@v1 of code.tar"
    assert command_line.main(["show", "other", "--outputs", str(target.root.parent)]) == 0
    assert "taken from" in capsys.readouterr().out
