"""Decoding with a base behind an API against the same decoding with the base in this process."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

import proxytune
from proxytune.errors import ModelError, SettingsError, TrioError
from proxytune.models import trio as trios
from proxytune.models.described import describe
from proxytune.models.loading import load_model
from proxytune.models.local import LocalSource
from proxytune.models.remote import BudgetSpent
from proxytune.settings import Decode, DecodeStage, ModelRef, Remote
from proxytune.stages import decode
from tests.models.tiny_family import tokenizer
from tests.remote import faults
from tests.remote.server import MODEL, behind

ASKED = [
    "Question: what follows 7?\nAnswer:",
    "Say 12.",
    "Who?",
    "Question: what follows 31?\nAnswer:",
    "A",
    "Two\nlines",
]


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ASKED))
    return str(path)


def run(place, **changes):
    return decode.run(place.settings(DecodeStage, **({"alpha": 1.0} | changes)))


def said(records):
    return [(row["id"], row["system"], row["token_ids"], row["text"], row["finish_reason"]) for row in records]


SAMPLED = Decode(max_new_tokens=6, temperature=0.7, seed=3)


@pytest.mark.parametrize(("name", "how"), [("vllm", Decode(max_new_tokens=6)), ("llamacpp", SAMPLED)])
def test_what_is_said_is_what_the_local_base_says(place, serving, prompts, name, how, capsys):
    here = run(place, prompts=prompts, decode=how, compare=True)
    with serving(name) as server:
        there = run(place, prompts=prompts, decode=how, compare=True, base=behind(server, draft_tokens=2))
    assert said(there) == said(here)
    certified = [row for row in there if row["system"] != "expert"]
    assert all(row["certified"] == 1 and row["marked"] == [] and row["calls"] > 0 for row in certified)
    assert [row for row in there if "calls" in row] == certified
    assert there[-1]["models"]["base"] == f"served at {server.url}"
    assert "steered: 100.0% of" in capsys.readouterr().err
    told = [json.loads(path.read_text())["summary"] for path in (place.outputs / "runs").glob("*/run.json")]
    assert [run["steered/certified"] for run in told if run] == [1.0]


def test_one_prompt_streams(place, serving, capsys):
    with serving("sglang") as server:
        (record,) = run(place, prompt=ASKED[0], decode=SAMPLED, base=behind(server))
    assert capsys.readouterr().out == record["text"] + "\n" and record["text"]


def test_uncertified_tokens_are_marked_by_their_places(place, serving):
    with serving("openai") as server:
        (record,) = run(place, prompt=ASKED[0], decode=Decode(max_new_tokens=6, temperature=2.0), base=behind(server))
    assert record["marked"] and record["certified"] == 1 - len(record["marked"]) / len(record["token_ids"])


def test_of_the_base_s_checkpoint_no_weights_are_needed(place, serving, tmp_path):
    folder = Path(shutil.copytree(place.family.base_ref.model, tmp_path / "base"))
    (folder / "model.safetensors").unlink()
    family = place.family.model_copy(update={"bases": {"base": ModelRef(model=str(folder))}})
    with serving("vllm") as server:
        (record,) = run(place, prompt=ASKED[0], family=family, base=behind(server))
    assert record["token_ids"] == run(place, prompt=ASKED[0])[0]["token_ids"]


def test_a_spent_budget_keeps_finished_replies_and_the_same_command_goes_on(place, serving, prompts, tmp_path, capsys):
    out = tmp_path / "replies.jsonl"
    whole = run(place, prompts=prompts)
    with serving("llamacpp") as server:
        asking = {"prompts": prompts, "out": out}
        with pytest.raises(BudgetSpent, match="max_requests=41"):
            run(place, base=behind(server, in_flight=2, max_requests=41), **asking)
        finished = [json.loads(line) for line in out.read_text().splitlines()]
        assert 0 < len(finished) < len(whole)
        assert said(finished) == [row for row in said(whole) if row[0] in {kept["id"] for kept in finished}]
        assert f"has the {len(finished)} that are finished" in capsys.readouterr().err
        before = len(server.asked)
        assert said(run(place, base=behind(server, in_flight=2), **asking)) == said(whole)
        again = [tuple(body["prompt"]) for body in server.asked[before:]]
        kept = {tuple(tokenizer()(row["prompt"]).input_ids) for row in finished}
        assert not kept & set(again) and len(again) > 0
    assert f"{len(finished)} replies were kept from before" in capsys.readouterr().err
    assert not list((place.outputs / "cache" / "replies").iterdir())


def test_replies_of_another_model_behind_the_same_address_are_not_gone_on_with(place, serving, prompts, base, capsys):
    with serving("llamacpp") as server:
        with pytest.raises(BudgetSpent):
            run(place, prompts=prompts, base=behind(server, in_flight=2, max_requests=40))
        server.model = lambda ids: -base(tuple(ids))
        run(place, prompts=prompts, base=behind(server))
    assert "were kept from before" not in capsys.readouterr().err


def test_without_memory_for_all_rows_fewer_are_asked_for_at_once(place, serving, prompts, scarce, capsys):
    with serving("llamacpp") as server:
        whole = run(place, prompts=prompts, base=behind(server, in_flight=6))
        scarce(6)  # expert and anti are read as two rows of one model for each row
        assert said(run(place, prompts=prompts, base=behind(server, in_flight=6))) == said(whole)
    assert capsys.readouterr().err.count("out of memory; going on with 3 rows at a time") == 1


def test_a_fault_that_lasts_keeps_finished_replies(place, serving, prompts, tmp_path):
    out = tmp_path / "replies.jsonl"
    with serving("vllm") as server:

        def breaks(handler, reply):
            server.faults.append(breaks)
            handler.reply(500 if len(server.asked) > 45 else 200, reply)

        server.faults = [breaks]
        with pytest.raises(ModelError, match="answered 500"):
            run(place, prompts=prompts, out=out, base=behind(server, in_flight=1, retries=0))
    assert 0 < len(out.read_text().splitlines()) < len(ASKED)


def test_marked_replies_are_not_kept_for_who_wants_certified_ones(place, serving, tmp_path):
    sampled, path = Decode(max_new_tokens=4, temperature=2.0), tmp_path / "prompts.txt"
    path.write_text("Say 12.\nWho?\n")
    with serving("openai") as server:
        with pytest.raises(BudgetSpent):
            run(place, prompts=str(path), decode=sampled, base=behind(server, in_flight=1, max_requests=16))
        journals = (place.outputs / "cache" / "replies").iterdir()
        lines = [json.loads(line) for journal in journals for line in journal.read_text().splitlines()]
        assert not all(next(line for line in lines if "top" in line)["reply"]["certified"])
        with pytest.raises(ModelError, match="of prompt 0 is not certified"):
            run(place, prompts=str(path), decode=sampled, base=behind(server, require_certified=True))


def test_a_base_that_tells_no_scores_is_pushed_where_that_is_asked_for_and_marked_inexact(place, serving, capsys):
    with serving("openai", told=False) as server:
        with pytest.raises(ModelError, match="answered 400"):
            run(place, prompt=ASKED[0], base=behind(server))
        (record,) = run(place, prompt=ASKED[0], base=behind(server, mode="bias"))
    assert record["inexact"] is True and record["certified"] == 0 and record["calls"] == len(record["token_ids"])
    assert "inexact: the base was pushed by a bias on 300 tokens" in capsys.readouterr().err
    assert all(0 < len(body["logit_bias"]) <= 300 and body.get("logprobs") is None for body in server.asked[-3:])
    with pytest.raises(SettingsError, match="base=openai"):
        Remote(name="vllm", url="http://127.0.0.1:1", mode="bias")


def test_a_server_that_lies_is_refused_by_the_test_s_name_and_nothing_is_recorded(place, serving):
    with serving("llamacpp") as server:
        server.lie = lambda reply, body: faults.put(reply, faults.pairs(reply)[1:]) or reply
        with pytest.raises(ModelError, match="failed the scores test"):
            run(place, prompt=ASKED[0], base=behind(server))
    assert not (place.outputs / "runs").exists()


KEY = "sk-canary-0123456789"


def test_the_key_is_in_no_file_and_no_message(place, serving, prompts, monkeypatch, capsys):
    monkeypatch.setenv("CANARY", KEY)
    with serving("vllm") as server:
        run(place, prompts=prompts, base=behind(server, key_variable="CANARY"))
        assert all(sent["Authorization"] == f"Bearer {KEY}" for sent in server.headers)
        for answer in (401, 500):
            server.faults = [faults.status(answer, {"error": {"message": f"wrong key {KEY}"}})] * 9
            with pytest.raises(ModelError) as error:
                run(place, prompts=prompts, base=behind(server, key_variable="CANARY", retries=0))
            assert KEY not in str(error.value) + repr(error.value)
    told = capsys.readouterr()
    assert KEY not in told.out + told.err
    written = [path for path in place.outputs.rglob("*") if path.is_file()]
    assert written and not [path for path in written if KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize("change", [{"base_top_p": 0.9}, {"alpha_by": "confidence"}, {"repetition_penalty": 1.2}])
def test_what_needs_the_base_s_whole_scores_is_refused(place, serving, change):
    with serving("vllm") as server, pytest.raises(SettingsError, match="behind an API"):
        run(place, prompt=ASKED[0], decode=Decode(max_new_tokens=4, **change), base=behind(server))


def test_a_prompt_beyond_the_small_models_context_is_refused(place, serving):
    room = describe(place.family.small).text.max_position_embeddings
    with serving("vllm") as server, pytest.raises(SettingsError, match="shorten the prompt"):
        run(place, prompt="one " * room, base=behind(server))


def test_python_says_the_same_with_a_base_behind_an_api(place, serving):
    here = proxytune.load("qa", outputs=place.outputs, alpha=1.0)
    with serving("vllm") as server:
        there = proxytune.load(
            "qa", {"name": "vllm", "url": server.url, "model": MODEL}, outputs=place.outputs, alpha=1.0
        )
        expected = here.generate(ASKED[:3], max_new_tokens=6)
        found = there.generate(ASKED[:3], max_new_tokens=6)
        assert [reply.token_ids for reply in found] == [reply.token_ids for reply in expected]
        assert all(all(reply.certified) and reply.calls for reply in found)
        assert "".join(there.stream(ASKED[0], max_new_tokens=6)) == expected[0].text
        with pytest.raises(SettingsError, match="behind an API"):
            _ = there.mixture


def test_a_notebook_s_own_event_loop_is_no_hindrance(place, serving):
    async def cell():
        there = proxytune.load("qa", behind(server), outputs=place.outputs, alpha=1.0)
        return there.generate(ASKED[0], max_new_tokens=4).token_ids, "".join(there.stream(ASKED[0], max_new_tokens=4))

    with serving("llamacpp") as server:
        ids, text = asyncio.run(cell())
    assert len(ids) <= 4 and text


def test_in_python_a_spent_budget_leaves_what_is_finished(place, serving):
    found = {}
    with serving("vllm") as server:
        there = proxytune.load("qa", behind(server, in_flight=1, max_requests=33), outputs=place.outputs, alpha=1.0)
        with pytest.raises(BudgetSpent):
            for i, reply in there.finished(ASKED, max_new_tokens=4):
                found[i] = reply
    assert 0 < len(found) < len(ASKED)


def test_settings_of_a_server_that_do_not_hold_are_told(place):
    with pytest.raises(SettingsError, match="unknown key tops"):
        proxytune.load("qa", {"name": "vllm", "url": "http://127.0.0.1:1", "tops": 3}, outputs=place.outputs)


def test_a_soft_capped_base_behind_an_api_is_refused_beside_uncapped_small_models(place):
    source = LocalSource(load_model(place.family.small, "float32"))
    trios.level_caps([source], [None])
    assert source.uncap_at is None
    with pytest.raises(TrioError, match="caps its scores at 30"):
        trios.level_caps([source], [30.0])
