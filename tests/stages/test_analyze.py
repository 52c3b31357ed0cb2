from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from proxytune.errors import DataError, SettingsError
from proxytune.experts.registry import Registry
from proxytune.files import Journal, read_checked, read_json, read_jsonl
from proxytune.settings import Analyze, Benchmark, DecodeStage, Evaluate, Sweep
from proxytune.stages import analyze, decode, evaluate, report, sweep
from proxytune.stages.shared import past


def look(place, **changes) -> dict:
    return analyze.run(place.settings(Analyze, **({"min_uses": 2, "bootstrap_samples": 50} | changes)))


def records(place, summary) -> list[dict]:
    return read_checked(place.outputs / summary["records"])


def test_an_evaluation_s_replies_are_looked_at_as_they_were_steered(place, pictures, capsys):
    run = evaluate.run(place.settings(Evaluate, alpha=0.5, bootstrap_samples=50)).path.parent
    found = look(place, run=run)
    assert (found["alpha"], found["system"], found["replies"], found["expert"]) == (0.5, "steered", 9, "qa@v1")
    folder = Path(capsys.readouterr().out.splitlines()[-1]).parent
    assert read_json(folder / "tokens.json") == read_json(run / "tokens.json") == found
    assert (folder / "tokens.png").stat().st_size > 1000
    assert {path.name for path in (folder / "tables").iterdir()} == {"tokens-by-class.jsonl", "tokens-moved.jsonl"}
    said = {row["id"]: row["token_ids"] for row in read_jsonl(run / "rows" / "steered-0.5.jsonl")}
    for row in records(place, found):  # greedy: what was said is what steered likes best
        assert row["ids"] == said[row["id"]][: len(row["ids"])] and len(said[row["id"]]) - len(row["ids"]) <= 1
        assert set(row["ranks"]["steered"]) == {1}


def test_what_was_scored_is_not_scored_again_and_a_killed_one_goes_on(place, monkeypatch):
    found = look(place, alpha=1.0)
    path = place.outputs / found["records"]
    whole = path.read_bytes()
    monkeypatch.setattr(analyze.trios, "load", lambda *_: pytest.fail("a trio was loaded"))
    assert look(place, alpha=1.0)["overall"] == found["overall"]
    monkeypatch.undo()
    rows = read_checked(path)
    path.unlink()
    journal = Journal(path.with_suffix(".part"))
    for _ in range(2):  # two such commands at once, both killed
        journal.append({"first": 0, "found": rows[:5]})
    with journal.path.open("a") as file:
        file.write('{"id": "cut')
    scored = []
    said = analyze._said
    monkeypatch.setattr(analyze, "_said", lambda system, one: scored.append(one.id) or said(system, one))
    look(place, alpha=1.0)
    assert len(scored) == len(rows) - 5
    assert [row["ids"] for row in read_checked(path)] == [row["ids"] for row in rows]
    assert not path.with_suffix(".part").exists() and path.read_bytes() == whole


def test_without_memory_for_a_batch_a_smaller_one_tells_the_same(place, scarce, capsys):
    found = look(place, alpha=1.0)
    (place.outputs / found["records"]).unlink()
    scarce(2)
    again = look(place, alpha=1.0)
    assert "out of memory; going on with one row at a time" in capsys.readouterr().err
    assert again["overall"]["changed"] == found["overall"]["changed"]


def test_a_decode_s_replies_keep_the_ids_that_were_said(place):
    prompts = place.outputs.parent / "prompts.txt"
    prompts.write_text("Question: what follows 4?\nSay 1\n")
    replies = decode.run(place.settings(DecodeStage, prompts=str(prompts), alpha=0.75, compare=True))
    run = max((place.outputs / "runs").glob("decode-*"), key=lambda path: path.stat().st_mtime)
    for system in ("base", "steered"):
        found = look(place, run=run, system=system)
        wanted = {row["id"]: row["token_ids"] for row in replies if row["system"] == system}
        rows = records(place, found)
        assert all(row["ids"] == wanted[row["id"]][: len(row["ids"])] for row in rows)
        assert all(len(wanted[row["id"]]) - len(row["ids"]) <= 1 for row in rows)  # the end token is left out
        assert found["alpha"] == 0.75
    assert {row["prompt"] for row in rows} == {"Question: what follows 4?", "Say 1"}


@pytest.fixture
def moving(place):
    """To be called: from then on `qa@latest` is another version."""
    registry = Registry(place.outputs / "registry")
    first = registry.resolve("qa@v1")

    def register():
        with registry.staging() as folder:
            shutil.copytree(first.folder, folder, dirs_exist_ok=True)
            registry.publish(folder, first.manifest)
        assert registry.resolve("qa@latest").version == 2

    return register


SEVERAL = [{"expert": "qa@latest", "alpha": 0.5}, {"expert": "qa@latest"}]


@pytest.mark.parametrize("kind", [DecodeStage, Evaluate, Sweep])
def test_several_experts_are_looked_at_as_they_were_when_latest_is_another_now(place, moving, kind):
    given = {"prompt": "Say 1"} if kind is DecodeStage else {"bootstrap_samples": 50}
    stage = {DecodeStage: decode, Evaluate: evaluate, Sweep: sweep}[kind]
    stage.run(place.settings(kind, steering=SEVERAL, **given))
    (run,) = (place.outputs / "runs").iterdir()
    moving()
    of = past.read(run).settings(Evaluate)
    assert [steer.expert for steer in of.steering] == ["qa@v1", "qa@v1"] and of.expert == "qa@v1"
    assert [steer.alpha for steer in of.steering] == [0.5, 1.0]
    if kind is DecodeStage:
        assert look(place, run=run)["expert"] == "qa@v1"


def test_a_sweep_is_looked_at_at_its_best_alpha_or_at_another(place):
    folder = sweep.run(place.settings(Sweep, alphas=[0.0, 1.0], bootstrap_samples=50)).path.parent
    chosen = read_json(folder / "summary.json")["chosen"]
    assert look(place, run=folder)["alpha"] == chosen
    run = next((place.outputs / "runs").glob("sweep-*"))
    assert look(place, run=run, alpha=0.0)["overall"]["changed"]["value"] == 0
    assert read_json(folder / "tokens.json")["alpha"] == 0.0


def test_a_benchmark_s_outputs_are_looked_at_and_told(place, tmp_path):
    rows = [{"question": f"What is {i} and one?", "answer": f"It is {i}+1.\n#### {i + 1}"} for i in range(4)]
    (tmp_path / "gsm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = Benchmark(name="gsm8k", rows=tmp_path / "gsm.jsonl", max_new_tokens=8)
    measured = place.settings(Evaluate, benchmark=asked, alpha=0.5, alphas=[1.0], bootstrap_samples=50)
    run = evaluate.run(measured).path.parent
    found = look(place, run=run)
    assert (found["task"], found["classes"], found["replies"]) == ("gsm8k", "math", 4)
    assert all("What is" in row["prompt"] for row in records(place, found))
    text = report.run(run).read_text("utf-8")
    assert 'id="alpha"' in text and "What is 3 and one?" in text and "unparsed" in text


def test_any_text_can_be_looked_at(place):
    file = place.outputs.parent / "texts.jsonl"
    rows = [{"prompt": "Say 1", "text": " 2 follows 1."}, {"messages": [{"role": "user", "content": "x"}], "text": ""}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = look(place, replies=file, classes="text", top=2)
    assert found["classes"] == "text" and found["replies"] == 1
    one, empty = records(place, found)
    assert "".join(one["pieces"]) == " 2 follows 1." and empty["ids"] == []
    assert all(len(row) == 2 for row in one["top"]["base"])


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("", "is empty"),
        ('{"prompt": "a"}\n', "line 1 is no reply"),
        ("nonsense", "line 1 is not a prompt"),
        ('{"prompt": 5, "text": "x"}', "line 1 is not a prompt"),
        ('{"messages": [{"role": "user"}], "text": "x"}', "line 1 is not a prompt"),
        ('{"prompt": "a", "text": "\\ud800"}', "line 1 holds half a character"),
        ('{"prompt": "a", "text": "x", "token_ids": "1 2"}', "line 1 is no reply"),
        ('{"prompt": "a", "text": "x", "token_ids": [1.5]}', "line 1 is no reply"),
        ('{"id": "b", "prompt": "a", "text": "x", "token_ids": [1, 99999]}', "reply 'b' has token ids that"),
    ],
)
def test_a_file_that_is_no_replies_is_refused(place, written, said):
    file = place.outputs.parent / "texts.jsonl"
    file.write_text(written)
    with pytest.raises(DataError, match=said):
        look(place, replies=file)


def test_what_is_no_run_is_refused(place, tmp_path):
    with pytest.raises(DataError, match="no run that wrote or measured"):
        look(place, run=tmp_path)
    with pytest.raises(SettingsError, match="both run= and replies="):
        place.settings(Analyze, run=tmp_path, replies=tmp_path)
