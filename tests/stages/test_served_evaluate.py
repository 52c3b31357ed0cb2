"""Evaluation, sweeps and benchmarks with a base behind an API against the same with the base in this process."""

from __future__ import annotations

import json

import pytest

from proxytune.errors import ModelError, SettingsError
from proxytune.experts.registry import Registry
from proxytune.models.remote import BudgetSpent
from proxytune.settings import Benchmark, Decode, Evaluate, Sweep
from proxytune.stages import evaluate, sweep
from tests.models.tiny_family import tokenizer
from tests.remote.server import MODEL, Server, behind


def run(place, server: Server | None = None, rows: int = 3, **changes):
    changes = {"data": place.data.model_copy(update={"limit_test": rows, "limit_validation": rows}), **changes}
    how = {key: changes.pop(key) for key in list(changes) if key in ("top", "max_requests", "in_flight", "retries")}
    if server:
        changes["base"] = behind(server, draft_tokens=2, **how)
    return evaluate.run(place.settings(Evaluate, **{"tuned": None, "alpha": 0.5, **changes}))


def of(found, key: str) -> list:
    return [[row.get(key) for row in rows] for rows in found.records.values()]


def asked_for_scores(server: Server) -> list[tuple[int, ...]]:
    return [tuple(body.get("prompt") or body["input_ids"]) for body in server.asked]


@pytest.mark.parametrize("name", ["vllm", "sglang", "llamacpp"])
def test_numbers_are_those_of_the_base_here(place, serving, name, capsys):
    here = run(place, rows=2, alphas=[0.0, 1.5])
    with serving(name) as server:
        there = run(place, server, rows=2, alphas=[0.0, 1.5])
    assert list(there.records) == list(here.records)
    assert of(there, "text") == of(here, "text") and of(there, "metrics") == of(here, "metrics")
    for mine, theirs in zip(of(there, "loss"), of(here, "loss"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    told = {(row["system"], row["alpha"]): row for row in there.summary["rows"]}
    assert told["steered", 0.5]["certified"] == told["base", None]["certified"] == 1
    assert told["steered", 0.5]["calls_per_token"] > 0 and "certified" not in told["expert", None]
    printed = capsys.readouterr()
    assert "steered at alpha 0.5: 100.0% of 12 tokens certified" in printed.out and "requests" in printed.err
    kept = Registry(place.outputs / "registry").resolve("qa").manifest.scores["test"]
    assert kept["base"] == f"served at {server.url}"


def test_a_loss_that_the_best_scores_do_not_tell_is_left_out_in_words(place, serving, capsys):
    with serving("vllm", most_top=20) as server:
        found = run(place, server)
    rows = {row["system"]: row for row in found.summary["rows"]}
    assert rows["base"]["loss"] is rows["steered"]["loss"] is None and rows["expert"]["loss"] > 0
    assert rows["steered"]["metric"] is not None
    assert "no loss of base and steered at alpha 0.5: the server's best scores leave open" in capsys.readouterr().out
    assert not any(body.get("prompt_logprobs", 0) > 20 for body in server.asked)


def test_an_uncertified_token_is_counted(place, serving):
    with serving("openai") as server:
        found = run(place, server, decode=Decode(max_new_tokens=6, temperature=2.0))
    (steered,) = (row for row in found.summary["rows"] if row["system"] == "steered")
    marked = sum(row["served"]["marked"] for row in found.records["steered", 0.5])
    tokens = sum(row["served"]["tokens"] for row in found.records["steered", 0.5])
    assert marked > 0 and steered["certified"] == pytest.approx(1 - marked / tokens)


def test_a_base_that_is_pushed_is_marked_inexact_in_the_table(place, serving, capsys):
    with serving("openai", told=False) as server:
        base = behind(server, mode="bias")
        found = run(place, base=base, rows=2)
        with pytest.raises(SettingsError, match="weighed by scores"):
            run(place, base=base, rows=2, benchmark=Benchmark(name="heldout_loss"))
    assert found.summary["notes"][0].startswith("inexact: the base was pushed by a bias")
    steered = next(row for row in found.summary["rows"] if row["system"] == "steered")
    assert (steered["certified"], steered["calls_per_token"], steered["loss"]) == (0, 1, None)
    assert "inexact: the base was pushed" in capsys.readouterr().out


def test_what_is_done_when_the_budget_is_spent_or_the_server_dies_is_kept(place, serving):
    with serving("llamacpp") as server:
        with pytest.raises(BudgetSpent, match="max_requests=111"):
            run(place, server, rows=4, in_flight=1, max_requests=111)
        parts = [path.read_text().splitlines() for path in (place.outputs / "points").glob("*.part")]
        done = [json.loads(line) for lines in parts for line in lines]
        assert any("loss" in row for row in done)
        before = len(server.asked)

        def breaks(handler, reply):
            server.faults.append(breaks)
            handler.reply(500 if len(server.asked) > before + 35 else 200, reply)

        server.faults = [breaks]
        with pytest.raises(ModelError, match="answered 500"):
            run(place, server, rows=4, in_flight=1, retries=0)
        server.faults, so_far = [], len(server.asked)
        found = run(place, server, rows=4, in_flight=1)
        last = len(server.asked) - so_far
    assert of(found, "text") == of(run(place, rows=4), "text")
    assert last < so_far  # what was weighed and written before was not asked for again
    assert not list((place.outputs / "points").glob("*.part"))


def test_a_second_run_asks_no_more_than_the_probe_and_another_model_is_measured_anew(place, serving):
    with serving("vllm") as server:
        first = run(place, server, generate=False)
        probed = len(server.asked)
        assert run(place, server, generate=False).summary["rows"] == first.summary["rows"]
        assert len(server.asked) - probed < probed and max(map(len, asked_for_scores(server)[probed:])) <= 20
        names = {path.name for path in (place.outputs / "points").iterdir()}
        honest = server.model
        server.model = lambda ids: honest(ids).roll(1, -1)  # under the same name
        run(place, server, generate=False)
    fresh = {path.name for path in (place.outputs / "points").iterdir()} - names
    assert sorted(name.split("-")[1] for name in fresh) == ["base", "steered"]


def test_the_key_is_in_no_file(place, serving, monkeypatch):
    monkeypatch.setenv("CANARY", "sk-canary-0123456789")
    with serving("vllm") as server:
        run(place, base=behind(server, key_variable="CANARY"), rows=2)
    written = [path for path in place.outputs.rglob("*") if path.is_file()]
    assert written and not [path for path in written if b"sk-canary" in path.read_bytes()]


def test_a_tuned_base_cannot_be_held_against_a_served_one(place, serving):
    with serving("vllm") as server, pytest.raises(SettingsError, match="tuned=qa-tuned"):
        run(place, server, tuned="qa-tuned")


# Sweep


def swept(place, server: Server, **changes):
    data = place.data.model_copy(update={"limit_validation": 2})
    return sweep.run(place.settings(Sweep, base=behind(server), data=data, tuned=None, alphas=[0.0, 1.0], **changes))


def test_a_sweep_chooses_by_loss_where_the_server_tells_it_and_by_metric_elsewhere(place, serving):
    with serving("vllm") as server:
        found = swept(place, server, generate=False)
    assert [row["loss"] is not None for row in found.summary["rows"]] == [True] * 4
    assert Registry(place.outputs / "registry").resolve("qa@best").manifest.scores["selection"]["by"] == "loss"
    with serving("vllm", most_top=20) as server:
        with pytest.raises(SettingsError, match="select=metric"):
            swept(place, server)
        swept(place, server, select="metric")
    kept = Registry(place.outputs / "registry").resolve("qa@best").manifest.scores["selection"]
    assert (kept["by"], kept["base"]) == ("metric", f"served at {server.url}")


# Benchmarks


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bench(place, name, path, server=None, **changes):
    return run(place, server, benchmark=Benchmark(name=name, rows=path, max_new_tokens=6), **changes)


def test_a_written_benchmark_has_the_same_outputs(place, serving, tmp_path, capsys):
    rows = jsonl(tmp_path / "g.jsonl", [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(3)])
    here = bench(place, "gsm8k", rows)
    with serving("sglang") as server:
        there = bench(place, "gsm8k", rows, server)
    assert of(there, "outputs") == of(here, "outputs")
    assert "tokens certified" in capsys.readouterr().out


def test_letters_are_weighed_by_their_own_scores(place, serving, tmp_path):
    choices = ["one", "two", "three", "four"]
    asked = [{"question": f"What is {i}?", "choices": choices, "answer": i % 4} for i in range(6)]
    rows = jsonl(tmp_path / "mmlu.jsonl", asked)
    here = bench(place, "mmlu", rows)
    with serving("vllm", most_top=20) as server:  # it is asked for the letters by their ids
        there = bench(place, "mmlu", rows, server)
        assert max(len(body.get("logprob_token_ids") or []) for body in server.asked[-6:]) == 4
    accuracy = {name: [row["measures"]["accuracy"]["value"] for row in f.summary["rows"]] for name, f in
                (("here", here), ("there", there))}  # fmt: skip
    assert accuracy["here"] == accuracy["there"]
    assert all(record["served"]["marked"] == 0 for record in there.records["steered", 0.5])


def test_longer_continuations_are_weighed_whole_or_refused(place, serving, tmp_path):
    asked = [{"prompt": f"Say {i}", "completion": " and then some more."} for i in range(2)]
    rows = jsonl(tmp_path / "rows.jsonl", asked)
    here = bench(place, "heldout_loss", rows)
    with serving("sglang") as server:
        there = bench(place, "heldout_loss", rows, server)
    for mine, theirs in zip(there.summary["rows"], here.summary["rows"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
    with serving("vllm", most_top=20) as server, pytest.raises(ModelError, match="leave that open"):
        bench(place, "heldout_loss", rows, server)


def test_of_five_scores_the_answer_s_letter_is_taken_and_questions_without_one_are_dropped(place, serving, tmp_path):
    choices = ["Rome", "Oslo", "Bern", "Kyiv"]
    asked = [
        {"question_id": f"q{i}", "question_sentence": f"Where {i}?", "choices": choices, "answer": [str(i % 4)]}
        for i in range(8)
    ]
    rows = jsonl(tmp_path / "rtqa.jsonl", asked)
    letters = [tokenizer()(f" {letter}").input_ids[0] for letter in "ABCD"]
    with serving("openai") as server:
        honest = server.model

        def likes_letters(ids):
            logits = honest(ids).clone()
            if sum(ids) % 3:  # every third question or so has none among its five
                logits[-1, letters[sum(ids) % 4]] += 40
                logits[-1, letters[(sum(ids) + 1) % 4]] += 39.5
            return logits

        server.model = likes_letters
        found = bench(place, "realtimeqa", rows, server)
    told = {row["system"]: row for row in found.summary["rows"]}
    dropped = sum(all(nats is None for nats in record["nats"]) for record in found.records["base", None])
    assert 0 < dropped < 8 and told["base"]["unparsed"] == told["steered"]["unparsed"] == dropped
    assert told["base"]["measures"]["accuracy"]["over"] == 8 - dropped
    assert told["base"]["measures"]["accuracy_all"]["over"] == told["expert"]["measures"]["accuracy"]["over"] == 8
    assert max(body["logprobs"] for body in server.asked) == 5 and server.asked[0]["model"] == MODEL
