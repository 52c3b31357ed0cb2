"""Files are whole or not there, what the system refuses is one line, and what is read again is checked."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune import files
from proxytune.errors import StorageError

PLAIN = st.text() | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False)
ROWS = st.lists(st.dictionaries(st.text().filter(lambda key: key != files.CHECK), PLAIN, max_size=3), max_size=4)


@contextlib.contextmanager
def refused(*words: str):
    with pytest.raises(StorageError) as caught:
        yield
    assert all(word in str(caught.value) for word in words) and len(str(caught.value).splitlines()) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def failing(error: OSError):
    def fail(*arguments, **more):
        raise error

    return fail


@given(ROWS)
def test_rows_are_read_as_they_were_written(rows):
    with tempfile.TemporaryDirectory() as place:
        for write, read in ((files.write_checked, files.read_checked), (files.write_jsonl, files.read_jsonl)):
            write(Path(place, "rows.jsonl"), rows)
            assert read(Path(place, "rows.jsonl")) == rows


@given(ROWS.filter(lambda rows: len(rows) > 1), st.data())
def test_a_row_that_is_missing_twice_there_or_elsewhere_is_damage(rows, data):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "rows.jsonl")
        files.write_checked(path, rows)
        lines = path.read_text("utf-8").split("\n")[:-1]
        n = data.draw(st.integers(0, len(rows) - 1))
        for changed in (lines[:n] + lines[n + 1 :], [*lines, lines[n]], lines[n:] + lines[:n] if n else lines[::-1]):
            path.write_text("\n".join(changed) + "\n", "utf-8")
            with refused(str(path), "damaged"):
                files.read_checked(path)


@given(st.dictionaries(st.text(), PLAIN, min_size=1), st.data())
def test_a_flipped_bit_is_seen(value, data):
    text = files.with_check(json.dumps(value), "salt")
    assert files.without_check(text, "salt") == {key: each for key, each in value.items() if key != files.CHECK}
    raw = bytearray(text.encode())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError):
        files.without_check(raw.decode(), "salt")
    with pytest.raises(ValueError):
        files.without_check(text, "other salt")


def test_a_text_with_line_separators_inside_stays_one_row(folder):
    files.write_jsonl(folder / "a", [{"text": "one\u2028two\u0085three"}])
    assert files.read_jsonl(folder / "a") == [{"text": "one\u2028two\u0085three"}]


@pytest.mark.parametrize("read", [files.read_json, files.read_jsonl, files.read_checked, files.Journal])
@pytest.mark.parametrize("content", [b"\xff\xfe{}\n", b'{"a": \n', b'{"a": 1} b\n'], ids=repr)
def test_what_is_not_json_is_named(folder, read, content):
    (folder / "a").write_bytes(content)
    with refused(str(folder / "a"), "damaged"):
        read(folder / "a")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_never_written(folder, value):
    for write in (files.write_json, lambda path, each: files.write_jsonl(path, [each])):
        with pytest.raises(ValueError):
            write(folder / "a", {"a": value})
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EACCES, "not allowed"),
        (errno.EPERM, "not allowed"),
        (errno.EROFS, "not allowed"),
        (errno.ENAMETOOLONG, "cannot write"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_the_system_refuses_leaves_the_old_file_and_no_rest(folder, monkeypatch, number, words, call):
    files.write_json(folder / "a", 1)
    with monkeypatch.context() as patch, refused(words, str(folder / "a")):
        patch.setattr(os, call, failing(OSError(number, os.strerror(number))))
        files.write_json(folder / "a", 2)
    assert os.listdir(folder) == ["a"] and files.read_json(folder / "a") == 1


def test_what_nobody_can_mend_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr(os, "replace", failing(OSError(errno.EIO, "a broken disk")))
    with pytest.raises(OSError, match="a broken disk"):
        files.write_json(folder / "a", 2)


def test_a_name_in_the_way_is_told(folder):
    (folder / "file").write_text("")
    (folder / "full" / "inside").mkdir(parents=True)
    with refused("cannot write", "file"):
        files.write_json(folder / "file" / "a", 1)
    with refused("cannot write", "full"):
        files.write_json(folder / "full", 1)
    with refused("cannot write", "file"), files.locked(folder / "file" / "lock"):
        pass
    with refused("cannot write", "file"):
        files.Journal(folder / "file" / "j")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_there_and_is_no_file_stays_what_it_is(folder, kind):
    path = Path(os.devnull) if kind == "device" else folder / "there"
    if kind != "device":
        {"folder": os.mkdir, "pipe": os.mkfifo}[kind](path)
    before = path.stat()
    with refused(f"cannot write {path}: it is there and is no file"):
        files.write_json(path, 1)
    assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)


def test_a_place_where_no_file_can_be_made_is_told():
    with refused("cannot write /proc/self/fd/999"):  # a descriptor that is closed
        files.write_json(Path("/proc/self/fd/999"), 1)


def test_a_link_of_the_system_s_is_refused_and_any_other_replaced(folder):
    (folder / "file").write_text("1")
    with (folder / "file").open("a") as file, refused("cannot write /proc/self/fd"):  # as /dev/stdout, sent to a file
        files.write_json(Path(f"/proc/self/fd/{file.fileno()}"), 2)
    (folder / "link").symlink_to("file")
    files.write_json(folder / "link", 2)
    assert files.read_json(folder / "link") == 2 and files.read_json(folder / "file") == 1


def test_everyone_may_read_what_was_written(folder):
    files.write_atomic(folder / "sub" / "a", b"bytes")
    assert (folder / "sub" / "a").stat().st_mode & 0o777 == 0o644 and (folder / "sub" / "a").read_bytes() == b"bytes"


def test_what_a_dead_writer_began_goes_with_the_next_write_and_a_living_one_s_stays(folder):
    old = time.time() - 2 * files.LEFTOVER_SECONDS
    names = {"dead": ".a.1.tmp", "held": ".a.2.tmp", "young": ".a.3.tmp", "another's": ".b.4.tmp"}
    for name in names.values():
        (folder / name).write_text("half")
        os.utime(folder / name, (old, old))
    os.utime(folder / names["young"])
    with files.locked(folder / names["held"]):
        files.write_json(folder / "a", 1)
    assert {*os.listdir(folder)} == {"a", *names.values()} - {names["dead"]}


def test_a_lock_is_known_while_it_is_held(folder):
    assert not files.is_locked(folder / "lock")
    with files.locked(folder / "sub" / "lock"):
        assert files.is_locked(folder / "sub" / "lock")
    assert not files.is_locked(folder / "sub" / "lock")


def test_a_folder_is_moved_only_to_where_no_files_are(folder):
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "a").write_text(name)
    files.replace_folder(folder / "one", folder / "new" / "place")
    assert (folder / "new" / "place" / "a").read_text() == "one" and not (folder / "one").exists()
    with pytest.raises(OSError):
        files.replace_folder(folder / "two", folder / "new" / "place")
    assert (folder / "new" / "place" / "a").read_text() == "one" and (folder / "two" / "a").read_text() == "two"


def test_a_removal_that_was_killed_is_finished_by_the_next(folder):
    (folder / ".it.gone").mkdir()
    (folder / ".it.gone" / "rest").write_text("")
    (folder / "it" / "deep").mkdir(parents=True)
    files.remove_folder(folder / "it")
    assert os.listdir(folder) == []
    files.remove_folder(folder / "it")  # nothing there is no error


def test_a_finished_journal_is_removed_and_the_next_begins_empty(folder):
    journal = files.Journal(folder / "sub" / "j")
    journal.append({"a": 1})
    journal.remove()
    assert os.listdir(folder / "sub") == [] and files.Journal(folder / "sub" / "j").rows == []


def test_hashes_are_those_of_the_content(folder):
    (folder / "a").write_bytes(b"abc" * (1 << 20))
    (folder / "empty").write_bytes(b"")
    assert files.hash_file(folder / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert files.hash_file(folder / "a") == "cc932bce1f4a5197761d0a4b0197f00a43a3eb6b0c0081b4add813521acac582"
    known = "13680baf89e37c786fd0273db10558e3c9e209dcd0d48d8461ee8b08ac2a717a"
    assert files.hash_json({"b": 1, "a": "ü"}) == files.hash_json({"a": "ü", "b": 1}) == known


def test_configuration_and_data_are_found_in_a_clone_and_in_an_installation(folder, monkeypatch):
    assert (files.resource("conf") / "evaluate.yaml").is_file() and files.resource("data").is_dir()
    package = folder / "proxytune"
    (package / "conf").mkdir(parents=True)
    monkeypatch.setattr(files, "__file__", str(package / "files.py"))
    assert files.resource("conf") == package / "conf" and files.resource("data") == folder / "data"
