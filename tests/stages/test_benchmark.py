from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipelines import launch
from pipelines.evaluate import gather
from proxytune.decoding.mixture import Mixture
from proxytune.errors import DataError, SettingsError, StorageError
from proxytune.evaluation import system
from proxytune.evaluation.benchmarks import weighed, written
from proxytune.evaluation.benchmarks.benchmark import Prompt, user
from proxytune.evaluation.benchmarks.harnessed import Harnessed
from proxytune.evaluation.summary import SCORES
from proxytune.evaluation.system import System
from proxytune.experts.registry import Registry
from proxytune.files import Journal, read_json, read_jsonl, resource
from proxytune.models.loading import load_model
from proxytune.settings import Benchmark, Decode, Evaluate, Harness, load
from proxytune.stages import benchmark, evaluate
from tests.evaluation import isolation
from tests.models.tiny_family import tokenizer

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "data"
MC = [
    {
        "question": f"what follows {i}?",
        "mc1_targets": {f"{i + 1}.": 1, f"{i}.": 0, "Nothing at all.": 0},
        "mc2_targets": {f"{i + 1}.": 1, "A number.": 1, f"{i}.": 0},
    }
    for i in range(5)
]


@pytest.fixture
def gsm(tmp_path) -> Path:
    rows = [{"question": f"What is {i} and one?", "answer": f"It is {i}+1.\n#### {i + 1}"} for i in range(7)]
    path = tmp_path / "gsm.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def mc(tmp_path) -> Path:
    path = tmp_path / "mc_task.json"
    path.write_text(json.dumps(MC))
    return path


def run(place, name: str, rows: Path | None = None, **changes):
    own = {key: changes.pop(key) for key in list(changes) if key in Benchmark.model_fields}
    chosen = Benchmark(name=name, rows=rows, **own)
    return evaluate.run(place.settings(Evaluate, benchmark=chosen, **changes))


def outputs(found, system: str, alpha: float | None = None) -> list[list[str]]:
    return [record["outputs"] for record in found.records[system, alpha]]


# Outputs


def test_every_system_is_measured_and_counted_and_its_rows_are_kept(place, gsm, capsys):
    found = run(place, "gsm8k", gsm, max_new_tokens=8, alpha=0.5, alphas=[1.0])
    summary = read_json(found.path)
    assert capsys.readouterr().out.splitlines()[-1] == str(found.path)
    systems = [(row["system"], row["alpha"]) for row in summary["rows"]]
    assert systems == [("base", None), ("expert", None), ("steered", 0.5), ("steered", 1.0), ("tuned", None)]
    assert (summary["task"], summary["chosen"], summary["gap_closed"].keys()) == ("gsm8k", 0.5, {"metric"})
    for row in summary["rows"]:
        assert (row["n"], row["outputs"], row["metric_name"], row["loss"]) == (7, 7, "exact_match", None)
        unparsed = sum(not any(letter.isdigit() for letter in text) for (text,) in outputs(found, *systems.pop(0)))
        assert row["unparsed"] == unparsed and row["measures"]["exact_match"]["over"] == 7
    assert 0 < summary["differences"][0]["mcnemar"] <= 1
    kept = read_jsonl(found.path.parent / "rows" / "steered-0.5.jsonl")
    assert [row["id"] for row in kept] == [f"test-{i}" for i in range(7)] and kept[0].keys() == {
        "id",
        "outputs",
        "verdicts",
    }
    assert len(read_jsonl(found.path.parent / SCORES)) == 5
    manifest = Registry(place.outputs / "registry").resolve("qa").manifest
    assert manifest.scores["gsm8k"].keys() == {"exact_match", "alpha", "n", "base"}


def test_alpha_zero_writes_the_base_s_own_outputs_and_many_alphas_write_what_each_writes_alone(place, gsm):
    many = run(place, "gsm8k", gsm, max_new_tokens=6, alpha=0.0, alphas=[0.5, 1.0], temperature=0.7, samples=2)
    assert outputs(many, "steered", 0.0) == outputs(many, "base")
    assert outputs(many, "steered", 1.0) != outputs(many, "base")
    alone = run(
        place,
        "gsm8k",
        gsm,
        max_new_tokens=6,
        alpha=0.5,
        temperature=0.7,
        samples=2,
        limit=6,
    )
    assert outputs(alone, "steered", 0.5) == outputs(many, "steered", 0.5)[:6]


def test_a_second_run_loads_no_model(place, gsm, monkeypatch):
    first = run(place, "gsm8k", gsm, max_new_tokens=6)
    monkeypatch.setattr(evaluate.trios, "load", lambda *_: pytest.fail("a trio was loaded"))
    monkeypatch.setattr(evaluate.alone, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert run(place, "gsm8k", gsm, max_new_tokens=6).summary["rows"] == first.summary["rows"]
    with pytest.raises(pytest.fail.Exception, match="was loaded"):
        run(place, "gsm8k", gsm, max_new_tokens=5)


def test_what_was_written_before_an_interruption_is_not_written_again(place, gsm, monkeypatch):
    whole = run(place, "gsm8k", gsm, max_new_tokens=6, temperature=1.0, tuned=None)
    for file in (place.outputs / "points").iterdir():
        file.unlink()
    append, count = written.Journal.append, iter(range(100))

    def interrupted(self, row):
        append(self, row)
        if next(count) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(written.Journal, "append", interrupted)
        run(place, "gsm8k", gsm, max_new_tokens=6, temperature=1.0, tuned=None)
    (part,) = (place.outputs / "points").glob("gsm8k-base-*.part")
    assert len(Journal(part).rows) == 4
    asked = []
    build = system.build
    monkeypatch.setattr(
        system, "build", lambda *given: (engine := build(*given), asked.append(engine))[0]
    )  # what the engines were given
    again = run(place, "gsm8k", gsm, max_new_tokens=6, temperature=1.0, tuned=None)
    assert [engine.handles for engine in asked] == [3, 7, 7] and again.records == whole.records
    assert not list((place.outputs / "points").glob("*.part"))


@pytest.mark.parametrize(("name", "stopped"), [("truthfulqa_likelihood", 3), ("heldout_loss", 4)])
def test_what_was_weighed_before_an_interruption_is_not_weighed_again(name, stopped, place, mc, monkeypatch):
    """Of single replies a batch that was cut (here the second, of three) is weighed again as a whole."""
    rows = mc if name != "heldout_loss" else None
    given = {"tuned": None, "alpha": 0.5, "alphas": [1.0], "score_batch_size": 3}
    whole = run(place, name, rows, **given)
    points, count = place.outputs / "points", len(whole.records["base", None])
    for file in points.glob(f"{name}-*"):
        file.unlink()
    append, left = weighed.Journal.append, iter(range(100))

    def interrupted(self, row):
        append(self, row)
        if next(left) == stopped - 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(weighed.Journal, "append", interrupted)
        run(place, name, rows, **given)
    (part,) = points.glob(f"{name}-base-*.part")
    assert len(Journal(part).rows) == stopped
    again = []
    monkeypatch.setattr(weighed, "track", lambda found, label, total: (again.append(total), found)[1])
    assert run(place, name, rows, **given).records == whole.records
    assert again == [count - 3, count, count]
    assert not list(points.glob("*.part"))


def test_alphas_that_the_harness_was_done_with_are_not_measured_again(tmp_path, monkeypatch):
    measured = []

    def once(self, system, alphas):
        measured.append(alphas)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return [{"results": {"acc": alphas[0]}}]

    monkeypatch.setattr(Harnessed, "_run", once)
    work = Harnessed("any", {}, Harness(), Decode(), batch_size=4, dtype="auto")
    how = ([(0.0,), (0.5,)], [tmp_path / "0.part", tmp_path / "1.part"])
    with pytest.raises(KeyboardInterrupt):
        work.compute(None, *how)
    found = work.at_most(2).compute(None, *how)
    assert measured == [(0.0,), (0.5,), (0.5,)]
    assert found == [[{"results": {"acc": 0.0}}], [{"results": {"acc": 0.5}}]]


@pytest.mark.parametrize("name", ["gsm8k", "truthfulqa_likelihood", "heldout_loss"])
def test_without_memory_for_a_batch_a_smaller_one_finds_the_same(name, place, gsm, mc, scarce, capsys):
    rows = {"gsm8k": gsm, "truthfulqa_likelihood": mc}.get(name)
    given = {"rows": rows, "alpha": 0.5, "max_new_tokens": 6}
    whole = run(place, name, **given)
    for file in (place.outputs / "points").glob(f"{name}-*"):
        file.unlink()
    scarce(2)
    found = run(place, name, **given)
    assert "out of memory; going on with one row at a time" in capsys.readouterr().err
    for one, other in zip(whole.summary["rows"], found.summary["rows"], strict=True):
        told = {measure: its["value"] for measure, its in other["measures"].items()}
        assert {measure: its["value"] for measure, its in one["measures"].items()} == pytest.approx(told, rel=1e-5)


def test_a_prompt_that_does_not_fit_is_told_and_counts_as_unparsed(place, gsm, capsys):
    gsm.write_text(gsm.read_text() + json.dumps({"question": "word " * 3000, "answer": "#### 1"}) + "\n")
    found = run(place, "gsm8k", gsm, max_new_tokens=6, tuned=None)
    assert outputs(found, "base")[-1] == [""] and found.summary["rows"][0]["too_long"] == 1
    assert "1 outputs are empty: their prompts do not fit" in capsys.readouterr().err


def test_what_cannot_be_judged_is_refused_before_a_model_is_loaded(place, gsm, monkeypatch):
    monkeypatch.setattr(evaluate.trios, "load", lambda *_: pytest.fail("a trio was loaded"))
    with pytest.raises(SettingsError, match="allow_code=true"):
        run(place, "humaneval", gsm)
    with pytest.raises(SettingsError, match="did you mean 'gsm8k'"):
        run(place, "gsm9k", gsm)
    with pytest.raises(DataError, match=r"truthfulqa_likelihood's public format"):
        run(place, "truthfulqa_likelihood", gsm)


@pytest.mark.parametrize("name", ["heldout_loss", "truthfulqa_likelihood", "gsm8k"])
def test_a_file_without_rows_is_refused_before_a_model_is_loaded(place, name, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.trios, "load", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"rows\.jsonl holds no rows"):
        run(place, name, tmp_path / "rows.jsonl")
    assert not (place.outputs / "runs").exists()


def test_programs_are_run_once_and_a_damaged_verdict_is_refused(place, monkeypatch):
    path = PUBLIC / "humaneval" / "HumanEval.jsonl.gz"
    if not path.exists():
        pytest.skip("HumanEval.jsonl.gz is not here")
    ran = []
    judge = written.verdicts.judge
    monkeypatch.setattr(written.verdicts, "judge", lambda *given: (ran.append(1), judge(*given))[1])
    how = {"limit": 2, "samples": 2, "max_new_tokens": 4, "allow_code": True, "sandbox": "limits", "tuned": None}
    how["python"] = isolation.anybodys_python()
    first = run(place, "humaneval", path, **how)
    assert first.summary["rows"][0]["measures"].keys() == {"pass@1"} and len(ran) == 3
    assert run(place, "humaneval", path, **how).summary["rows"] == first.summary["rows"] and len(ran) == 3
    kept, *_ = place.outputs.rglob("*.verdicts")
    kept.write_bytes(kept.read_bytes().replace(b"0.0", b"1.0", 1))
    with pytest.raises(StorageError, match=f"{kept.name} is damaged"):
        run(place, "humaneval", path, **how)


# Prompts


def test_a_chat_model_s_reply_begins_with_the_opening_and_a_plain_model_reads_the_plain_prompt():
    own = tokenizer()
    system = System("x", Mixture(None, None), own, {"x": own}, {"x": "chat"}, frozenset(), None)  # type: ignore
    prompt = Prompt("Question: why?\nAnswer:", user("Question: why?"), "Answer:")
    read = own.decode(system._encode(prompt, own, "chat"))
    plain = own.apply_chat_template(
        [{"role": "user", "content": "Question: why?"}], add_generation_prompt=True, tokenize=False
    )
    assert read == plain + "Answer:"
    assert own.decode(system._encode(prompt, own, "plain")) == "Question: why?\nAnswer:"


def test_banned_texts_are_banned_in_every_spelling():
    class Words:
        def batch_decode(self, ids):
            return [["pass", " pass", "password", "...", "..", "\tpass"][i] for (i,) in ids]

    assert written.spelled(("pass", "..."), Words(), 6) == {0, 1, 3, 5}


# Likelihoods


def test_the_loss_of_held_out_replies_is_evaluate_s_own_to_the_last_bit(place):
    losses = evaluate.run(place.settings(Evaluate, alpha=0.5, generate=False))
    found = run(place, "heldout_loss", alpha=0.5)
    for key, records in losses.records.items():
        told = [(record["id"], record["nats"][0], record["tokens"][0]) for record in found.records[key]]
        assert told == [(record["id"], record["loss"], record["tokens"]) for record in records]
    assert [row["loss"] for row in found.summary["rows"]] == [row["loss"] for row in losses.summary["rows"]]
    assert read_jsonl(found.path.parent / SCORES) == read_jsonl(losses.path.parent / SCORES)


def test_what_is_longer_than_a_context_is_left_out_of_all_systems_and_counted(place, mc, monkeypatch, capsys):
    rows, file = read_jsonl(Path(place.data.test)), mc.with_name("longer.jsonl")
    long = {**rows[0], "id": "long", "prompt": "word " * 3000 + "last"}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, long]))
    longer = place.data.model_copy(update={"test": str(file)})
    shorter = evaluate.run(place.settings(Evaluate, alpha=0.5, data=longer))
    assert "1 rows are left out: they are longer than a model's context" in capsys.readouterr().err
    whole = evaluate.run(place.settings(Evaluate, alpha=0.5))
    for one, other in zip(shorter.summary["rows"], whole.summary["rows"], strict=True):
        assert (one["n"], one["metric"]) == (len(rows) + 1, other["metric"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert shorter.records["base", None][-1]["too_long"]
    mc.write_text(json.dumps([*MC, {**MC[0], "question": "word " * 3000}]))
    found = run(place, "truthfulqa_likelihood", mc, tuned=None)
    assert [row["measures"]["mc1"]["over"] for row in found.summary["rows"]] == [5, 5, 5]
    assert "1 rows are left out" in capsys.readouterr().err
    mc.write_text(json.dumps([{**MC[0], "question": "word " * 3000}]))
    with pytest.raises(DataError, match="all of the 1 rows are longer"):
        run(place, "truthfulqa_likelihood", mc, tuned=None)


def test_summaries_of_one_measure_share_a_fingerprint_of_their_rows(place, gsm, mc):
    first = run(place, "gsm8k", gsm, max_new_tokens=3, tuned=None).summary["rows_fingerprint"]
    again = run(place, "gsm8k", gsm, max_new_tokens=2, tuned=None, alpha=0.5).summary["rows_fingerprint"]
    fewer = run(place, "gsm8k", gsm, max_new_tokens=2, tuned=None, limit=6).summary["rows_fingerprint"]
    assert first and first == again != fewer
    own = evaluate.run(place.settings(Evaluate, generate=False)).summary["rows_fingerprint"]
    assert own and own == run(place, "heldout_loss").summary["rows_fingerprint"]


def test_humaneval_s_solutions_have_a_loss(place):
    path = PUBLIC / "humaneval" / "HumanEval.jsonl.gz"
    if not path.exists():
        pytest.skip("HumanEval.jsonl.gz is not here")
    found = run(place, "heldout_loss", path, limit=3, tuned=None)
    assert [row["n"] for row in found.summary["rows"]] == [3, 3, 3] and found.summary["rows"][0]["loss"] > 0


def test_mc1_and_mc2_are_what_the_model_itself_says(place, mc):
    found = run(place, "truthfulqa_likelihood", mc, alpha=0.0, alphas=[1.0], tuned=None)
    own, model = tokenizer(), load_model(place.family.base_ref, "float32")
    rows = weighed.load(Benchmark(name="truthfulqa_likelihood", rows=mc))
    mc1, mc2 = [], []
    for raw, row in zip(MC, rows, strict=True):
        assert row.prompt.plain.endswith(f"Barcelona, Spain.\n\nQ: {raw['question']}\nA:")
        logs = {}
        for answer in {**raw["mc1_targets"], **raw["mc2_targets"]}:
            before, whole = own(row.prompt.plain).input_ids, own(f"{row.prompt.plain} {answer}").input_ids
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0, :, : len(own)].log_softmax(-1)
            logs[answer] = sum(float(logits[i - 1, whole[i]]) for i in range(len(before), len(whole)))
        mc1.append(float(max(raw["mc1_targets"], key=lambda answer: logs[answer]) == next(iter(raw["mc1_targets"]))))
        weights = torch.tensor([logs[answer] for answer in raw["mc2_targets"]]).softmax(0)
        mc2.append(float(weights[:2].sum()))
    measures = found.summary["rows"][0]["measures"]
    assert measures["mc1"]["value"] == sum(mc1) / 5 and measures["mc2"]["value"] == pytest.approx(
        sum(mc2) / 5, abs=1e-5
    )
    assert found.records["steered", 0.0] == found.records["base", None] != found.records["steered", 1.0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"question": "\ud800"}, "row 2: the row holds half a character"),
        ({"mc1_targets": {}}, "row 2: a question has no answers"),
        ({"mc2_targets": {"choices": [], "labels": []}}, "row 2: a question has no answers"),
        ({"mc1_targets": 5}, "row 2: "),
    ],
)
def test_a_question_that_cannot_be_weighed_is_named_by_its_place(mc, changes, said):
    mc.write_text(json.dumps([MC[0], {**MC[1], **changes}]))
    with pytest.raises(DataError, match=said):
        weighed.load(Benchmark(name="truthfulqa_likelihood", rows=mc))


def test_mmlu_is_read_by_subject(tmp_path):
    header = "question,choice0,choice1,choice2,choice3,answer\n"
    for subject in ("anatomy", "virology"):
        (tmp_path / f"{subject}_test.csv").write_text(header + f'"Of {subject}, what?",a,b,"c, or d",e,2\n' * 2)
    first, second = weighed.load(Benchmark(name="mmlu", rows=tmp_path, limit=2))
    assert first.prompt.plain == "Of anatomy, what?\nA. a\nB. b\nC. c, or d\nD. e\nAnswer:"
    assert (first.options[2], first.sets) == (" C", {"accuracy": {0: False, 1: False, 2: True, 3: False}})
    assert second.groups == {"subject": "virology"}


def test_the_benchmarks_that_are_weighed_are_counted_by_hand():
    nats, right = [2.0, 1.0, 1.0], {0: False, 1: True, 2: False}
    assert weighed.likeliest(nats, right) == 1 and weighed.likeliest(nats, {0: True, 2: False}) == 0
    assert weighed.share([700.0, 700.0, 701.0], {0: True, 1: False}) == pytest.approx(0.5)
    assert {"heldout_loss", *weighed.KINDS} == {"heldout_loss", "mmlu", "truthfulqa_likelihood"}


@pytest.mark.parametrize("name", ["gsm8k", "humaneval", "heldout_loss", *weighed.KINDS])
def test_a_benchmark_composes_with_evaluate_and_is_left_out_by_default(name):
    import hydra

    with hydra.initialize_config_dir(str(resource("conf")), job_name="evaluate", version_base="1.3"):
        without = launch.plain(hydra.compose("evaluate"), "evaluate", None)
        values = launch.plain(hydra.compose("evaluate", [f"benchmark={name}", "alphas=[0,1]"]), "evaluate", None)
    assert load(Evaluate, without).benchmark is None
    assert load(Evaluate, values).benchmark == Benchmark(name=name) and load(Evaluate, values).alphas == [0, 1]


def test_a_multirun_over_alpha_ends_in_one_table(place, gsm, monkeypatch):
    jobs = []
    for alpha in (0.5, 1.0):
        chosen = Benchmark(name="gsm8k", rows=gsm, max_new_tokens=3)
        settings = place.settings(Evaluate, benchmark=chosen, alpha=alpha, tuned=None)
        evaluate.run(settings)
        jobs.append(settings.model_dump(mode="json"))
    monkeypatch.setattr(evaluate.trios, "load", lambda *_: pytest.fail("a trio was loaded"))
    before = set((place.outputs / "runs").iterdir())
    gather(jobs)
    (folder,) = set((place.outputs / "runs").iterdir()) - before
    rows = read_json(folder / "summary.json")["rows"]
    assert [row["alpha"] for row in rows if row["system"] == "steered"] == [0.5, 1.0]


def test_the_stage_is_reached_from_evaluate_only_with_a_benchmark(place, monkeypatch):
    monkeypatch.setattr(benchmark, "run", lambda _: pytest.fail("a benchmark was run"))
    evaluate.run(place.settings(Evaluate, generate=False))
