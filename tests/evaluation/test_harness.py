"""The harness's own `hf` model is the reference: alpha 0 is the base, alpha 1 on the anti is the expert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxytune.errors import DataError, ModelError, SettingsError
from proxytune.evaluation.benchmarks import harnessed
from proxytune.evaluation.summary import rows_file
from proxytune.files import read_jsonl, resource
from proxytune.models.loading import load_model
from proxytune.settings import Benchmark, Evaluate, Harness, ModelRef, load
from proxytune.stages import evaluate
from tests.stages.conftest import place, trained  # noqa: F401  the registry with an expert

lm_eval = pytest.importorskip("lm_eval", reason="the harness is not installed: proxytune[harness]")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from proxytune.evaluation.harness import Proxytune  # noqa: E402

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "data"
BASE = resource("data") / "tiny" / "base"
PAIRS = [
    ("Question: what is two and two?\nAnswer:", " four"),
    ("The capital of France is ", "Paris, and it lies on a river."),
    ("", "once upon a time"),
    ("def area(radius):", "\n    return 3.14 * radius ** 2\n"),
]


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def base() -> HFLM:
    return HFLM(pretrained=str(BASE), dtype="float32", device="cpu", batch_size=3)


def steered(place, base=BASE, **changes) -> Proxytune:  # noqa: F811
    given = {"expert": "qa@latest", "alpha": 0.0, "base": str(base), "outputs": place.outputs, "batch_size": 3}
    return Proxytune.create_from_arg_obj({**given, "dtype": "float32", **changes})


def told(found: list[tuple[float, bool]]) -> list:
    return [(pytest.approx(nats, abs=2e-4), greedy) for nats, greedy in found]


def test_alpha_zero_gives_the_likelihoods_of_the_base(base, place):  # noqa: F811
    ours, requests = steered(place), asked("loglikelihood", *PAIRS)
    assert ours.loglikelihood(requests, disable_tqdm=True) == told(base.loglikelihood(requests, disable_tqdm=True))
    said = base.generate_until(asked("generate_until", (PAIRS[0][0], {"until": ["\n"], "max_gen_toks": 3})))
    (greedy,) = ours.loglikelihood(asked("loglikelihood", (PAIRS[0][0], said[0])))
    assert said[0] and greedy[1]
    assert steered(place, alpha=1.0).loglikelihood(requests) != ours.loglikelihood(requests)


def test_likelihoods_of_numbers_that_are_none_are_refused(place, monkeypatch):  # noqa: F811
    ours = steered(place)
    source, cut = ours.mixture.base.source, ours.mixture.base.source.cut
    monkeypatch.setattr(source, "cut", lambda logits: cut(logits) * float("nan"))
    with pytest.raises(ModelError, match="position 0 of a reply of"):
        ours.loglikelihood(asked("loglikelihood", PAIRS[0]))


def test_alpha_one_on_the_anti_is_the_expert(place):  # noqa: F811
    small = place.family.small.model
    expert = load_model(ModelRef(model=small), "float32", adapter=place.outputs / "registry" / "qa" / "v1")
    reference = HFLM(pretrained=expert, tokenizer=small, batch_size=3)
    ours = steered(place, small, alpha=1.0)
    requests = asked("loglikelihood", *PAIRS)
    assert ours.loglikelihood(requests) == told(reference.loglikelihood(requests))
    writing = asked("generate_until", *((context, {"until": ["\n"], "max_gen_toks": 6}) for context, _ in PAIRS[:2]))
    assert ours.generate_until(writing) == reference.generate_until(writing)


def test_long_texts_are_read_in_the_harness_s_own_windows(base, place):  # noqa: F811
    text = "It was a dark night. " * 40
    requests = asked("loglikelihood_rolling", (text,), ("Short.",))
    short = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=2, max_length=50)
    expected = [pytest.approx(nats, rel=1e-5) for nats in short.loglikelihood_rolling(requests)]
    assert steered(place, max_length=50).loglikelihood_rolling(requests) == expected
    pair = asked("loglikelihood", (text, " And then"))
    assert steered(place, max_length=50).loglikelihood(pair) == told(short.loglikelihood(pair))


def test_a_chat_is_put_to_each_model_by_its_own_template(base, place):  # noqa: F811
    ours, chat = steered(place), [{"role": "user", "content": "Say hello."}]
    text = ours.apply_chat_template(chat)
    assert text == base.apply_chat_template(chat)
    requests = asked("loglikelihood", (text, "hello"), (text + "Oh, ", "hello"))
    assert ours.loglikelihood(requests) == told(base.loglikelihood(requests))
    ours.system.tokenizers["anti"].chat_template = None
    text = ours.apply_chat_template(chat)
    read = ours._prompts(text + "Oh,")
    anti = ours.system.tokenizers["anti"]
    assert anti.decode(read["anti"]) == "Say hello.\nOh," and ours.tokenizer.decode(read["base"]) == text + "Oh,"


@pytest.fixture(scope="module")
def real_tasks(tmp_path_factory) -> Path:
    """A folder with a multiple-choice task and one that is written, of a few public rows."""
    sources = [PUBLIC / "truthfulqa" / "mc_task.json", PUBLIC / "gsm8k" / "test.jsonl"]
    if not all(source.exists() for source in sources):
        pytest.skip("the public rows are not here")
    folder = tmp_path_factory.mktemp("tasks")
    raws = json.loads(sources[0].read_text())[:6]
    rows = [{"question": raw["question"], "choices": list(raw["mc1_targets"])} for raw in raws]
    (folder / "mc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "gsm.jsonl").write_text("".join(sources[1].open().readlines()[:4]))
    shared = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    tasks = [
        shared
        | {"task": "local_mc", "dataset_kwargs": {"data_files": {"test": str(folder / "mc.jsonl")}}}
        | {"output_type": "multiple_choice", "doc_to_text": "Q: {{question}}\nA:"}
        | {"doc_to_choice": "choices", "doc_to_target": 0},
        shared
        | {"task": "local_gsm", "dataset_kwargs": {"data_files": {"test": str(folder / "gsm.jsonl")}}}
        | {"output_type": "generate_until", "doc_to_text": "Question: {{question}}\nAnswer:"}
        | {"doc_to_target": "{{answer}}", "generation_kwargs": {"until": ["Question:"], "max_gen_toks": 20}}
        | {"filter_list": [{"name": name, "filter": how} for name, how in FILTERS.items()]},
    ]
    for task in tasks:
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task))
    return folder


FILTERS = {
    "strict": [{"function": "regex", "regex_pattern": "#### (.*)"}, {"function": "take_first"}],
    "whole": [{"function": "take_first"}],
}


def harness_s_own(model, tasks: Path, **how) -> dict:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model, tasks=["local_mc", "local_gsm"], task_manager=manager, bootstrap_iters=0, **how
    )


def test_the_harness_runs_real_rows_and_both_models_score_the_same(base, place, real_tasks):  # noqa: F811
    found = [harness_s_own(model, real_tasks) for model in (base, steered(place))]
    assert found[0]["results"].keys() == {"local_mc", "local_gsm"} and found[0]["results"] == found[1]["results"]
    texts = [[sample["resps"] for sample in one["samples"]["local_gsm"]] for one in found]
    assert texts[0] == texts[1] and any(text[0][0].strip() for text in texts[0])


# From here


def ran(place, tasks: Path, **changes):  # noqa: F811
    settings = {"harness": ["local_mc"], "lm_eval": Harness(include_path=tasks), "tuned": None}
    ref = ModelRef(model=str(BASE))
    return evaluate.run(place.settings(Evaluate, **(settings | {"base_model": ref} | changes)))


def test_evaluate_tells_the_harness_s_own_numbers_for_every_system(base, place, real_tasks, capsys):  # noqa: F811
    reference = harness_s_own(base, real_tasks)["results"]
    found = ran(place, real_tasks, harness=["local_mc", "local_gsm"], alpha=0.0, alphas=[0.5])
    runs = [Path(line).parent for line in capsys.readouterr().out.splitlines() if line.endswith("summary.json")]
    assert len(runs) == 2 and runs[1] == found.path.parent
    for folder, task, metric in zip(runs, ("local_mc", "local_gsm"), ("acc", "exact_match,strict"), strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        rows = {(row["system"], row["alpha"]): row for row in summary["rows"]}
        assert summary["task"] == task and rows.keys() == {
            ("base", None), ("expert", None), ("steered", 0.0), ("steered", 0.5)
        }  # fmt: skip
        for key in (("base", None), ("steered", 0.0)):
            assert rows[key]["harness"][task] == reference[task]
            own = {"acc": "acc,none", "exact_match,strict": "exact_match,strict"}[metric]
            assert rows[key]["metric_name"] == metric and rows[key]["metric"] == reference[task][own]
        record = json.loads((folder / "run.json").read_text())
        assert f"base/{metric}" in record["summary"] and (folder / "tables" / "evaluation.jsonl").is_file()
    bases, same, other = (read_jsonl(rows_file(found.path.parent, *key)) for key in (
        ("base", None), ("steered", 0.0), ("steered", 0.5)
    ))  # fmt: skip
    assert bases == same != other and bases[0]["id"] == "local_gsm/0"


def test_what_was_measured_by_the_harness_is_not_measured_again(place, real_tasks, monkeypatch):  # noqa: F811
    small = ModelRef(model=place.family.small.model)
    first = ran(place, real_tasks, base_model=small, lm_eval=Harness(include_path=real_tasks, limit=3))
    assert [row["n"] for row in first.summary["rows"]] == [3, 3, 3]
    monkeypatch.setattr(evaluate.trios, "load", lambda *_: pytest.fail("a trio was loaded"))
    again = ran(place, real_tasks, base_model=small, lm_eval=Harness(include_path=real_tasks, limit=3))
    assert again.summary["rows"] == first.summary["rows"]
    with pytest.raises(pytest.fail.Exception, match="was loaded"):
        ran(place, real_tasks, base_model=small, lm_eval=Harness(include_path=real_tasks, limit=2))


def test_what_the_harness_cannot_run_is_one_line(place, real_tasks, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        harnessed, "manager", lambda path, _: TaskManager(include_path=str(path), include_defaults=False)
    )
    with pytest.raises(SettingsError, match=r"no task 'local_nc' \(did you mean 'local_mc'"):
        ran(place, real_tasks, harness=["local_nc"])
    with pytest.raises(SettingsError, match="no such folder"):
        ran(place, tmp_path / "nowhere")
    broken = {"task": "broken", "dataset_path": "json", "test_split": "test", "output_type": "generate_until"}
    broken |= {"doc_to_text": "x", "doc_to_target": "y", "dataset_kwargs": {"data_files": {"test": "/not/there.jsonl"}}}
    (tmp_path / "broken.yaml").write_text(json.dumps(broken))
    with pytest.raises(DataError, match=r"cannot run broken: .*not/there"):
        ran(place, tmp_path, harness=["broken"])
    with pytest.raises(SettingsError, match="both benchmark= and harness="):
        place.settings(Evaluate, harness="local_mc", benchmark=Benchmark(name="gsm8k"))


def test_tasks_are_named_as_a_line_of_text_or_as_a_list():
    import hydra

    from pipelines import launch

    assert launch.as_meant("harness=a,b") == "harness=[a,b]" and launch.as_meant("harness=[a]") == "harness=[a]"
    for given, names in (("harness=a,b", ["a", "b"]), ("harness=a", ["a"]), ("seed=0", [])):
        with hydra.initialize_config_dir(str(resource("conf")), job_name="evaluate", version_base="1.3"):
            values = launch.plain(hydra.compose("evaluate", [launch.as_meant(given)]), "evaluate", None)
        assert load(Evaluate, values).harness == names


def test_contexts_that_are_too_long_are_counted(place, capsys):  # noqa: F811
    ours = steered(place, max_length=12)
    ours.loglikelihood(asked("loglikelihood", ("one " * 40, " two"), ("one", " two")))
    assert ours.shortened == 1
    with pytest.raises(SettingsError, match=r"writes 12 tokens and the models read 12"):
        ours.generate_until(asked("generate_until", ("one", {"until": [], "max_gen_toks": 12})))


def test_the_name_is_registered_and_its_arguments_are_a_line_of_text(place):  # noqa: F811
    from lm_eval.api.registry import get_model

    line = f"expert=qa@v1+qa@latest,alpha=0.25+0.5,base={place.family.small.model},outputs={place.outputs}"
    model = get_model("proxytune").create_from_arg_string(line, {"batch_size": "auto", "device": None})
    assert model.alphas == (0.25, 0.5) and len(model.mixture.pairs) == 2


def test_the_entry_point_names_this_model():
    import tomllib

    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lm_eval.models"] == {"proxytune": f"{Proxytune.__module__}:{Proxytune.__name__}"}
