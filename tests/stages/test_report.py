from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipelines import cli
from proxytune.errors import DataError
from proxytune.files import read_json
from proxytune.settings import Analyze, DecodeStage, Evaluate, Sweep
from proxytune.stages import analyze, decode, evaluate, report, sweep

ALPHAS = [0.0, 0.5, 1.0]


def data(path: Path) -> dict:
    return json.loads(re.search(r'type="application/json">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)[1])


def test_an_evaluation_becomes_one_page_with_what_every_system_wrote(place, capsys):
    run = evaluate.run(place.settings(Evaluate, alpha=0.5, bootstrap_samples=50)).path.parent
    path = report.run(run, command="proxytune report it")
    assert path == run / "report.html" and Path(capsys.readouterr().out.splitlines()[-1]) == path
    found = data(path)
    assert [system["key"] for system in found["systems"]] == ["base", "expert", "steered", "tuned"]
    row = found["rows"][0]
    assert row["prompt"].startswith("Question: what follows") and row["reference"].strip().endswith(".")
    assert set(row["texts"]) == {"base", "expert", "steered", "tuned"} and set(row["scores"]["base"]) == {"exact match"}
    assert all("tokens" in row for row in found["rows"]) and (run / "pictures" / "report.png").is_file()
    text = path.read_text("utf-8")
    for told in ("proxytune report it", "qa@v1", "fingerprint", "proxytune analyze run=", "weights"):
        assert told in text
    record = read_json(max((place.outputs / "runs").glob("report-*/run.json")))
    assert record["status"] == "finished" and record["stage"] == "report"


def test_a_sweep_s_curves_need_no_model(place, monkeypatch):
    folder = sweep.run(place.settings(Sweep, alphas=ALPHAS, generate=False, bootstrap_samples=50)).path.parent
    monkeypatch.setattr(analyze.trios, "load", lambda *_: pytest.fail("a trio was loaded"))
    text = report.run(folder, tracker="none").read_text("utf-8")
    assert 'id="alpha"' in text and "divergence, nats per token" in text and "Best alpha by loss" in text
    assert 'id="generations"' not in text and "Tokens were not looked at" in text


def test_tokens_are_scored_once_and_only_if_wanted(place, monkeypatch):
    run = evaluate.run(place.settings(Evaluate, alpha=1.0, tuned=None, bootstrap_samples=50)).path.parent
    loaded = []
    look = analyze.run
    monkeypatch.setattr(analyze, "run", lambda settings: loaded.append(settings.run) or look(settings))
    first = report.run(run, tokens=False, out=run / "plain.html")
    assert loaded == [] and not any("tokens" in row for row in data(first)["rows"])
    for _ in range(2):
        assert all("tokens" in row for row in data(report.run(run))["rows"])
    assert loaded == [run]


def test_a_decode_is_told_without_measures(place):
    decode.run(place.settings(DecodeStage, prompt="Say <1>", alpha=1.0, compare=True))
    (run,) = (place.outputs / "runs").glob("decode-*")
    path = report.run(run)
    (row,) = data(path)["rows"]
    assert row["prompt"] == "Say <1>" and set(row["texts"]) == {"base", "expert", "steered"} and row["tokens"]
    assert 'id="results"' not in path.read_text("utf-8")


def test_replies_are_found_from_another_folder_and_missed_in_one_line(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    decode.run(place.settings(DecodeStage, prompt="Say 1", alpha=1.0, out="mine.jsonl"))
    (run,) = (place.outputs / "runs").glob("decode-*")
    monkeypatch.chdir(place.outputs)
    assert data(report.run(run, tokens=False))["rows"]
    (tmp_path / "mine.jsonl").unlink()
    missed = f"the replies of {run} are missing: there is no {tmp_path / 'mine.jsonl'}"
    with pytest.raises(DataError, match=re.escape(missed)):
        report.run(run)
    with pytest.raises(DataError, match=re.escape(missed)):
        analyze.run(place.settings(Analyze, run=run))


def test_a_decode_that_was_killed_before_it_wrote_has_no_replies_to_tell_of(place, monkeypatch):
    monkeypatch.setattr(decode, "write_jsonl", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        decode.run(place.settings(DecodeStage, prompt="Say 1", alpha=1.0))
    (run,) = (place.outputs / "runs").glob("decode-*")
    with pytest.raises(DataError, match=r"are missing: there is no .*replies\.jsonl"):
        report.run(run)


def test_from_the_command_line(place, capsys, tmp_path):
    run = evaluate.run(place.settings(Evaluate, alpha=1.0, tuned=None, bootstrap_samples=50)).path.parent
    capsys.readouterr()
    out = tmp_path / "a b.html"
    options = ["--no-tokens", "--generations", "2", "--tracker", "none", "--out", str(out)]
    assert cli.main(["report", str(run / "summary.json"), *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert len(data(out)["rows"]) == 2 and "--generations 2" in out.read_text("utf-8")
    near = run.with_name(run.name[:-1])
    assert cli.main(["report", str(near)]) == DataError.exit_code
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"proxytune: there is no {near} (did you mean {run.name!r}")
