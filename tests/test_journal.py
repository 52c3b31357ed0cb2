from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune import files
from proxytune.errors import StorageError


@given(st.lists(st.dictionaries(st.text() | st.just(files.CHECK), st.text() | st.integers()), max_size=6), st.data())
def test_a_journal_cut_anywhere_keeps_its_whole_rows_and_goes_on(rows, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "j.part"
        journal = files.Journal(path)
        for row in rows:
            journal.append(row)
        written = path.read_bytes()
        cut = data.draw(st.integers(0, len(written)))
        path.write_bytes(written[:cut])
        again = files.Journal(path)
        assert again.rows == rows[: written[:cut].count(b"\n")]
        again.append({"more": 1})
        assert files.Journal(path).rows == [*again.rows, {"more": 1}]


@pytest.mark.parametrize("row", [{}, {"check": ""}, {"check": "00000000", "a": 1}, {"a": '", "check": "'}])
def test_a_row_may_look_like_a_checksum(tmp_path, row):
    path = tmp_path / "j.part"
    files.Journal(path).append(row)
    assert files.Journal(path).rows == [row]
    files.write_checked(tmp_path / "rows.jsonl", [row, row])
    assert files.read_checked(tmp_path / "rows.jsonl") == files.read_jsonl(tmp_path / "rows.jsonl") == [row, row]
    files.write_json(tmp_path / "one.json", row, checked=True)
    assert files.read_json(tmp_path / "one.json") == row


def test_a_journal_damaged_in_the_middle_is_told_not_mended(tmp_path):
    path = tmp_path / "j.part"
    journal = files.Journal(path)
    for number in range(3):
        journal.append({"a": number})
    first, second, third = path.read_text().splitlines(keepends=True)
    path.write_text(first + second[:9] + "\n" + third)
    with pytest.raises(StorageError, match=r"j\.part is damaged: line 2: "):
        files.Journal(path)


def test_a_row_from_before_there_were_checksums_is_taken_and_every_flipped_bit_of_a_later_one_seen(tmp_path):
    path = tmp_path / "j.part"
    path.write_text('{"a": 0}\n')
    files.Journal(path, old=True).append({"a": "J"})
    files.Journal(path, old=True).append({"a": 2})
    assert files.Journal(path, old=True).rows == [{"a": 0}, {"a": "J"}, {"a": 2}]
    with pytest.raises(StorageError, match="line 1: "):
        files.Journal(path)
    whole = path.read_bytes()
    for at in range(whole.index(b"\n") + 1, len(whole) - 1):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            with pytest.raises(StorageError, match=r"line [23]: "):
                files.Journal(path, old=True)
