"""Real loops of a random family: a seed, rounds of answers to rows, a server that judges them."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from proxytune import files
from proxytune.errors import DataError, ModelError, RegistryError, SettingsError, StorageError
from proxytune.experts.registry import Registry
from proxytune.experts.self_rewarding.pairs import OUTCOMES
from proxytune.models.identity import identify
from proxytune.models.loading import load_tokenizer
from proxytune.models.trio import load as load_trio
from proxytune.settings import Data, Expert, TaskChoice
from proxytune.stages import expert
from proxytune.stages.self_rewarding import loop
from proxytune.stages.self_rewarding import method as self_rewarding
from proxytune.stages.shared import trio as trios
from tests.evaluation.test_judges import Api
from tests.models.tiny_family import write_rows

TRAINING = {"eval_strategy": "no", "logging_steps": 1}
METHOD = {
    "name": "self_rewarding",
    "prompts": "rows",
    "seed_rows": 24,
    "prompts_per_round": 12,
    "temperature": 1.0,
    "judge": {"by": "task"},
    "held_out": 4,
    "sft": TRAINING | {"max_steps": 6, "save_steps": 3},
    "dpo": TRAINING | {"max_steps": 2, "save_steps": 1},
}
STEPS = ("prompts", "answers", "judgements", "pairs")  # files of a round, in the order that they are made
TASK = TaskChoice(name="instruction", max_new_tokens=24, stop=["e"])  # where the words of a random model end


def settings(place, **changes):
    method = METHOD | changes.pop("method", {})
    return place.settings(Expert, **({"task": TASK, "method": method} | changes))


def tree(folder: Path) -> dict[str, bytes]:
    """But for what a kill may leave for a minute: a file that was being written."""
    files = [p for p in folder.rglob("*") if p.is_file() and not (p.name[0] == "." and p.suffix == ".tmp")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def results(outputs: Path) -> dict[str, bytes]:
    """All that a loop leaves to stay, and the weights of what it registered."""
    registry = Registry(outputs / "registry")
    weights = {
        one.reference: json.dumps(trios.weights_of(one)).encode()
        for name in registry.names()
        for one in [registry.resolve(f"{name}@v{version}") for version in registry.versions(name)]
    }
    judged = {name: data for name, data in tree(outputs / "self_rewarding").items() if "/judge/" not in name}
    return judged | tree(outputs / "points") | weights  # a server's answers are kept in the order they came


class Scorer(Api):
    """Points by the length of the reply; those of some lengths get none."""

    def reply(self, body):
        reply = body["messages"][0]["content"].split("Reply:\n")[1].split("\n\nExplain")[0]
        content = f"So so.\nScore: {len(reply) % 6}" if len(reply) % 7 else "It is good."
        return {"choices": [{"message": {"content": content}}], "usage": {}}


@pytest.fixture(scope="module")
def scorer():
    with Scorer() as made:
        yield made


def by(scorer, **more):
    """The server judges. A method's settings; retries fail at once."""
    return {"judge": {"by": "judge-1", "url": scorer.url, "samples": 2, "timeout": 60, "retries": 0} | more}


@pytest.fixture(scope="module")
def looped(trained, scorer, tmp_path_factory):
    """A place where a loop of two rounds ran, its settings, and its last iterate."""
    place = replace(trained, outputs=tmp_path_factory.mktemp("looped") / "outputs")
    return place, by(scorer), expert.run(settings(place, method=by(scorer)))


@pytest.mark.slow
def test_each_round_leaves_its_files_and_an_expert_with_its_chain(looped):
    place, _, last = looped
    registry = Registry(place.outputs / "registry")
    assert registry.names() == ["instruction-m1", "instruction-m2", "instruction-m3"]
    assert last.reference == "instruction-m3@v1"
    assert [(a.reference, a.method) for a in last.manifest.lineage] == [
        ("instruction-m1@v1", "sft"),
        ("instruction-m2@v1", "dpo"),
    ]
    small = place.family.small
    assert last.manifest.anti == identify(small, load_tokenizer(small)), "steering subtracts the untuned model"
    (work,) = (folder for folder in (place.outputs / "self_rewarding").iterdir() if folder.is_dir())
    for number in (1, 2):
        read = {path.stem: files.read_jsonl(path) for path in (work / f"round-{number}").glob("*.jsonl")}
        assert set(read) == set(STEPS) and (work / f"round-{number}" / "judge").is_dir()
        counts = files.read_json(work / f"round-{number}" / "yield.json")
        assert counts["prompts"] == 12 == sum(counts[outcome] for outcome in OUTCOMES)
        assert 2 * counts["replies"] == counts["judgements"] == 96 and counts["pairs"] == len(read["pairs"]) >= 2
        for row in read["pairs"]:
            answer = next(each for each in read["answers"] if each["id"] == row["id"])
            assert {row["chosen"], row["rejected"]} <= {reply["text"] for reply in answer["replies"]}
    seed = files.read_jsonl(work / "seed" / "train.jsonl")
    asked = files.read_jsonl(work / "round-1" / "prompts.jsonl")
    assert len(seed) == 24 and not {row["id"] for row in seed} & {row["id"] for row in asked}
    summary = files.read_json(work / "summary.json")
    assert [one["expert"] for one in summary["iterates"]] == [f"instruction-m{n}@v1" for n in (1, 2, 3)]
    assert summary["iterates"][2]["gained"]["ci"][0] <= summary["iterates"][2]["gained"]["value"]
    assert not list((place.outputs / "cache").rglob("replies/*.jsonl")), "nothing is left of what was under way"


@pytest.mark.slow
def test_a_trio_steers_with_an_iterate_and_a_repeated_command_makes_nothing_new(looped):
    place, method, last = looped
    middle = Registry(place.outputs / "registry").resolve("instruction-m2")
    trio = load_trio(place.family.base_ref, [trios.files_of(middle)], "float32")
    (tuned, anti), ids = trio.pairs[0], [7, 8, 9]
    scores = [term.source.score([[[5, 6]]], [ids], (term.member,))[0][0] for term in (tuned, anti)]
    assert tuned.source is anti.source and not torch.equal(*scores)
    before = results(place.outputs)
    assert expert.run(settings(place, method=method)).reference == last.reference
    assert results(place.outputs) == before


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_loop_that_is_killed_again_and_again_ends_with_the_very_files_of_one_that_was_not(
    looped, tmp_path, monkeypatch
):
    """Killed in the answers of both rounds, between steps, and between a training and the next step."""
    place = replace(looped[0], outputs=tmp_path / "outputs")
    append, write, remove = files.Journal.append, loop.write_checked, expert.remove_folder
    said = []

    def journalled(self, row):
        append(self, row)
        if "answer" not in row:  # that of a judge
            said.append(row.get("system", "point"))
            if len(said) in (20, 70):
                raise Killed

    def written(path, rows):
        write(path, rows)
        if path.name == "judgements.jsonl" and path.parent.name == "round-1":
            monkeypatch.setattr(loop, "write_checked", write)
            raise Killed

    def removed(folder):
        monkeypatch.setattr(expert, "remove_folder", remove)
        raise Killed

    monkeypatch.setattr(files.Journal, "append", journalled)
    monkeypatch.setattr(loop, "write_checked", written)
    monkeypatch.setattr(expert, "remove_folder", removed)
    deaths = 0
    while deaths < 9:
        try:
            last = expert.run(settings(place, method=looped[1]))
            break
        except Killed:
            deaths += 1
    assert deaths == 4 and last.reference == "instruction-m3@v1"
    assert sum(system.startswith("answers") for system in said) == 2 * 48, "no answer was written twice"
    mine, whole = results(place.outputs), results(looped[0].outputs)
    assert mine.keys() == whole.keys() and [name for name in whole if mine[name] != whole[name]] == []


PROGRAM = """
import contextlib, os, pathlib, signal, threading, time
from proxytune.settings import Expert
from proxytune.stages import expert

def begun():
    with contextlib.suppress(FileNotFoundError):  # it is gone again
        return any(path.stat().st_size for path in pathlib.Path({outputs!r}).glob({pattern!r}))

def look():
    while not begun():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=look, daemon=True).start()
expert.run(Expert.model_validate_json({settings!r}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["cache/replies/*.jsonl", "training/*/checkpoints/checkpoint-1/complete.json"])
def test_a_loop_that_dies_of_a_signal_ends_with_the_very_files_of_one_that_did_not(warm, looped, tmp_path, pattern):
    """While answers are being written, and while a round's training has a checkpoint."""
    place = replace(looped[0], outputs=tmp_path / "outputs")
    asked = settings(place, method=looped[1])
    told = {"outputs": str(place.outputs), "pattern": pattern, "settings": asked.model_dump_json(exclude_unset=True)}
    done = warm.run([], program=PROGRAM.format(**told))
    assert done.code == -signal.SIGKILL, f"it ended before it could be killed: {done.err}"
    assert expert.run(asked).reference == "instruction-m3@v1"
    mine, whole = results(place.outputs), results(looped[0].outputs)
    assert mine.keys() == whole.keys() and [name for name in whole if mine[name] != whole[name]] == []


@pytest.fixture
def damaged(looped, tmp_path):
    """The place where a loop ran, whole again after the test."""
    outputs = looped[0].outputs
    shutil.copytree(outputs, tmp_path / "whole")
    yield looped
    shutil.rmtree(outputs)
    shutil.move(tmp_path / "whole", outputs)


def bit(data: bytes) -> bytes:
    """Another letter in a text, number or name near the end."""
    at = max(n for n, byte in enumerate(data[:-40]) if chr(byte).isalnum())
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def cut(data: bytes) -> bytes:
    """Without the last of its lines."""
    return data[: data.rstrip().rindex(b"\n") + 1]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [bit, cut])
@pytest.mark.parametrize(
    "name", ["seed/train.jsonl", "seed/test.jsonl", *(f"round-1/{step}.jsonl" for step in STEPS), "round-1/yield.json"]
)
def test_a_file_that_lost_a_bit_or_a_row_is_refused_and_the_next_iterate_not_tuned(damaged, name, damage):
    place, method, _ = damaged
    registry = Registry(place.outputs / "registry")
    for later in ("instruction-m2", "instruction-m3"):
        registry.remove(later)
    (work,) = (folder for folder in (place.outputs / "self_rewarding").iterdir() if folder.is_dir())
    if name not in ("round-1/pairs.jsonl", "round-1/yield.json"):
        (work / "round-1" / "pairs.jsonl").unlink()  # it was killed before
    path = work / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StorageError, match=rf"{path.name} is damaged"):
        expert.run(settings(place, method=method))
    assert registry.names() == ["instruction-m1"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3])
def test_an_iterate_that_lost_a_bit_is_not_used(damaged, number):
    place, method, _ = damaged
    weights = place.outputs / "registry" / f"instruction-m{number}" / "v1" / "adapter_model.safetensors"
    weights.write_bytes(bit(weights.read_bytes()))
    with pytest.raises(RegistryError, match=rf"instruction-m{number}@v1 is damaged: .*adapter_model"):
        expert.run(settings(place, method=method))


@pytest.mark.slow
def test_answers_that_are_made_anew_are_judged_anew(damaged):
    place, method, _ = damaged
    whole = results(place.outputs)
    (work,) = (folder for folder in (place.outputs / "self_rewarding").iterdir() if folder.is_dir())
    prompts, answers, judgements, pairs = (work / "round-1" / f"{step}.jsonl" for step in STEPS)
    answers.unlink()
    pairs.unlink()
    files.write_checked(judgements, files.read_jsonl(judgements)[::-1])
    expert.run(settings(place, method=method))
    assert results(place.outputs) == whole and prompts.is_file()


@pytest.mark.slow
def test_an_iterate_that_is_tuned_again_has_its_round_again(damaged, monkeypatch):
    place, method, _ = damaged
    Registry(place.outputs / "registry").remove("instruction-m1")
    (work,) = (folder for folder in (place.outputs / "self_rewarding").iterdir() if folder.is_dir())

    def killed(settings):
        raise Killed

    again = settings(place, method=method)
    monkeypatch.setattr(expert, "run", killed)
    with pytest.raises(Killed):
        self_rewarding.run(again)
    assert [path.name for path in (work / "round-1").iterdir()] == ["judge"], "what is paid for stays"
    assert (work / "round-2" / "yield.json").is_file()


def served(scorer, **more):
    """A short loop of one round."""
    short = {"rounds": 1, "prompts_per_round": 4, "held_out": 0, "sft": METHOD["sft"] | {"max_steps": 4}}
    return short | by(scorer) | more


@pytest.mark.slow
def test_a_server_judges_by_the_rubric_and_is_never_asked_twice(place, scorer):
    scorer.asked.clear()
    scorer.faults = [500] * 40
    with pytest.raises(ModelError, match=r"left \d+ of 32 questions unanswered .*same command again"):
        expert.run(settings(place, method=served(scorer)))
    scorer.faults.clear()
    scorer.asked.clear()
    made = expert.run(settings(place, method=served(scorer)))
    assert made.reference == "instruction-m2@v1" and len(scorer.asked) == 32
    assert all(body["temperature"] == 0.7 and body["max_tokens"] == 256 for _, body in scorer.asked)
    (work,) = (folder for folder in (place.outputs / "self_rewarding").iterdir() if folder.is_dir())
    counts = files.read_json(work / "round-1" / "yield.json")
    assert counts["judgements"] == 32 and 0 < counts["unparsed"] < 16
    (work / "round-1" / "judgements.jsonl").unlink()
    (work / "round-1" / "yield.json").unlink()
    expert.run(settings(place, method=served(scorer)))
    assert len(scorer.asked) == 32, "its answers are kept"


@pytest.mark.slow
def test_a_random_model_s_own_judgements_are_none_and_the_round_says_so(place):
    own = {"judge": {"by": "self", "samples": 2, "max_new_tokens": 4}, "rounds": 1, "prompts_per_round": 3}
    with pytest.raises(DataError, match=r"round 1 made 0 pairs of 3 prompts .*24 of 24 judgements unparsed"):
        expert.run(settings(place, method=own | {"sft": METHOD["sft"] | {"max_steps": 2, "max_length": 800}}))
    (work,) = (folder for folder in (place.outputs / "self_rewarding").iterdir() if folder.is_dir())
    rows = files.read_jsonl(work / "seed" / "train.jsonl")
    assert len(rows) == 48 and sum("Score: " in row["completion"] for row in rows) == 24
    assert len(files.read_jsonl(work / "round-1" / "judgements.jsonl")) == 3


@pytest.mark.slow
def test_proposed_prompts_are_new_and_every_proposal_is_kept_with_why_it_was_dropped(place, scorer, monkeypatch):
    """Killed when all are written, and none is written again."""
    proposing = served(scorer, prompts="propose", proposer="embedded:base", shots=3, similarity=1.0)
    append, write = files.Journal.append, loop.write_checked
    said = []

    def journalled(self, row):
        append(self, row)
        said.append(row.get("system", "a judge's").partition(" ")[0])

    def written(path, rows):
        if path.name == "prompts.jsonl":
            monkeypatch.setattr(loop, "write_checked", write)
            raise Killed
        write(path, rows)

    monkeypatch.setattr(files.Journal, "append", journalled)
    monkeypatch.setattr(loop, "write_checked", written)
    with pytest.raises(Killed):
        expert.run(settings(place, method=proposing))
    expert.run(settings(place, method=proposing))
    (work,) = (folder for folder in (place.outputs / "self_rewarding").iterdir() if folder.is_dir())
    proposals = files.read_jsonl(work / "round-1" / "proposals.jsonl")
    prompts = files.read_jsonl(work / "round-1" / "prompts.jsonl")
    assert [row["text"] for row in proposals if row["dropped"] is None][: len(prompts)] == [
        row["prompt"].removeprefix("Question: what follows ").removesuffix("\nAnswer:") for row in prompts
    ]
    assert 0 < len(prompts) <= 4
    assert said.count("proposals") == len(proposals) and not list((place.outputs / "cache" / "replies").iterdir())


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"dpo": {"bta": 0.1}}, r"unknown key method\.bta: TRL's DPOConfig .*did you mean 'beta'"),
        ({"sft": {"max_step": 1}}, r"unknown key method\.max_step: TRL's SFTConfig .*did you mean 'max_steps'"),
        ({"sft": {"too_long": "cut"}}, r"^method\.sft\.too_long='cut': Input should be 'truncate', 'drop' or 'fail'$"),
        ({"dpo": {"too_long": "cut"}}, r"^method\.dpo\.too_long='cut': "),
        ({"dpo": {"name": "x"}}, r"^method\.dpo\.name='x': Input should be 'dpo'$"),
        ({"sft": {"name": "dpo"}}, r"^method\.sft\.name='dpo': Input should be 'sft'$"),
    ],
)
def test_a_field_that_one_of_the_trainers_does_not_have_is_told_before_the_seed_is_tuned(place, fields, told):
    with pytest.raises(SettingsError, match=told):
        expert.run(settings(place, method=fields))
    assert not [name for name in Registry(place.outputs / "registry").names() if name.startswith("instruction")]


def test_a_seed_that_leaves_no_prompts_is_refused_before_training(place, tmp_path):
    data = Data(source="files", train=write_rows(tmp_path / "few.jsonl", 0, 9))
    with pytest.raises(DataError, match="the seed takes 24 of 8 train rows"):
        expert.run(settings(place, data=data))
    assert not [name for name in Registry(place.outputs / "registry").names() if name.startswith("instruction")]
