"""The harness's own `hf` model is the reference: alpha 0 is the base, alpha 1 on the anti is the expert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxytune.files import resource
from proxytune.models.loading import load_model
from proxytune.settings import ModelRef
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
    ours.trio.tokenizers["anti"].chat_template = None
    text = ours.apply_chat_template(chat)
    read = ours._prompts(text + "Oh,")
    anti = ours.trio.tokenizers["anti"]
    assert anti.decode(read["anti"]) == "Say hello.\nOh," and ours.tokenizer.decode(read["base"]) == text + "Oh,"


def test_the_harness_runs_real_rows_and_both_models_score_the_same(base, place, tmp_path):  # noqa: F811
    sources = [PUBLIC / "truthfulqa" / "mc_task.json", PUBLIC / "gsm8k" / "test.jsonl"]
    if not all(source.exists() for source in sources):
        pytest.skip("the public rows are not here")
    raws = json.loads(sources[0].read_text())[:6]
    rows = [{"question": raw["question"], "choices": list(raw["mc1_targets"])} for raw in raws]
    (tmp_path / "mc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gsm.jsonl").write_text("".join(sources[1].open().readlines()[:4]))
    shared = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    tasks = [
        shared
        | {"task": "mc", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "mc.jsonl")}}}
        | {"output_type": "multiple_choice", "doc_to_text": "Q: {{question}}\nA:"}
        | {"doc_to_choice": "choices", "doc_to_target": 0},
        shared
        | {"task": "gsm", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "gsm.jsonl")}}}
        | {"output_type": "generate_until", "doc_to_text": "Question: {{question}}\nAnswer:"}
        | {"doc_to_target": "{{answer}}", "generation_kwargs": {"until": ["Question:"], "max_gen_toks": 20}},
    ]
    manager = TaskManager(include_defaults=False)
    found = [
        lm_eval.simple_evaluate(model, tasks=json.loads(json.dumps(tasks)), task_manager=manager, bootstrap_iters=0)
        for model in (base, steered(place))
    ]
    assert found[0]["results"].keys() == {"mc", "gsm"} and found[0]["results"] == found[1]["results"]
    texts = [[sample["resps"] for sample in one["samples"]["gsm"]] for one in found]
    assert texts[0] == texts[1] and any(text[0][0].strip() for text in texts[0])


def test_the_name_is_registered_and_its_arguments_are_a_line_of_text(place):  # noqa: F811
    from lm_eval.api.registry import get_model

    line = f"expert=qa@v1+qa@latest,alpha=0.25+0.5,base={place.family.small.model},outputs={place.outputs}"
    model = get_model("proxytune").create_from_arg_string(line, {"batch_size": "auto", "device": None})
    assert model.steered.alphas == (0.25, 0.5) and len(model.mixture.pairs) == 2


def test_the_entry_point_names_this_model():
    import tomllib

    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lm_eval.models"] == {"proxytune": f"{Proxytune.__module__}:{Proxytune.__name__}"}
