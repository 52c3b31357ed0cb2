"""Settings that hold one by one and not together are refused, and what may be left open is filled in."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest

from proxytune import settings
from proxytune.errors import SettingsError
from tests.test_cli import KINDS, compose

MODEL = {"model": "org/name"}
FAMILY = {"name": "f", "small": MODEL, "bases": {"8b": MODEL}, "base": "8b"}
JUDGED = {"name": "alpaca_farm"}
VLLM = {"name": "vllm", "url": "http://127.0.0.1:8000"}

TOGETHER: list[tuple[str, dict[str, Any], str]] = [
    ("evaluate", {"harness": "arc_easy", "benchmark": {"name": "gsm8k"}}, "both benchmark= and harness="),
    ("analyze", {"run": "a", "replies": "b"}, "both run= and replies="),
    ("analyze", {"base": VLLM}, "takes no base behind an API"),
    ("expert", {"anti": "start"}, "from=NAME"),
    ("expert", {"sample_steps": 5, "model": "base"}, "model=base"),
    ("expert", {"sample_steps": 5, "launch": {"name": "ddp"}}, "launch=single"),
    ("expert", {"launch": {"name": "single", "processes": 2}}, "launch=ddp"),
    ("expert", {"launch": {"name": "ddp", "offload": True}}, "launch=fsdp2"),
    ("expert", {"peft": {"use_dora": True}}, "peft=none"),
    ("bench", {"expert": "qa"}, "trio=family"),
    ("decode", {"base": VLLM | {"mode": "bias"}}, "base=openai"),
    ("decode", {"base": VLLM | {"name": "openai", "mode": "bias", "require_certified": True}}, "require_certified"),
    ("decode", {"base": VLLM | {"url": "ftp://host"}}, "such as http://"),
    ("decode", {"base": VLLM | {"url": "http:///path"}}, "such as http://"),
    ("decode", {"base": VLLM | {"url": "http://host/?key=hunter22"}}, "key_variable"),
    ("decode", {"base": VLLM | {"url": "http://host/#hunter22"}}, "key_variable"),
    ("decode", {"base": VLLM | {"url": "http://hunter22@host"}}, "key_variable"),
    ("decode", {"base": VLLM | {"url": "http://127.0.0.1:80a0"}}, "Port could not be cast"),
    ("decode", {"base": VLLM | {"url": "http://host:0"}}, "such as http://"),
    ("decode", {"base": VLLM | {"url": "http://host/a b"}}, "such as http://"),
    ("evaluate", {"benchmark": JUDGED | {"judge": {"url": "http://host:abc/v1"}}}, "Port could not be cast"),
    ("evaluate", {"benchmark": JUDGED | {"judge": {"url": "https://user:hunter22@host/v1"}}}, "judge's key"),
    ("score", {"benchmark": JUDGED | {"judge": {"url": "https://host/v1?key=hunter22"}}}, "judge's key"),
]


@functools.cache
def composed(stage: str) -> dict[str, Any]:
    return compose(stage)


def with_values(stage: str, changes: dict[str, Any]) -> Any:
    return settings.load(KINDS[stage], copy.deepcopy(composed(stage)) | changes)


@pytest.mark.parametrize(("stage", "changes", "words"), TOGETHER, ids=lambda value: str(value)[:60])
def test_settings_that_exclude_each_other_are_refused_with_what_to_do(stage, changes, words):
    with pytest.raises(SettingsError) as refused:
        with_values(stage, changes)
    told = str(refused.value)
    assert words in told and len(told.splitlines()) == 1 and "hunter22" not in told


@pytest.mark.parametrize(
    ("key", "suggested"),
    [("alhpa", "alpha"), ("decode.temprature", "temperature"), ("family.smal", "small"), ("tracker.tag", "tags")],
)
def test_an_unknown_key_gets_the_nearest_one(key, suggested):
    values = copy.deepcopy(composed("evaluate"))
    *path, last = key.split(".")
    functools.reduce(lambda part, name: part[name], path, values)[last] = 1
    with pytest.raises(SettingsError, match=f"unknown key {key} .*'{suggested}'"):
        settings.load(settings.Evaluate, values)


@pytest.mark.parametrize("key", ["base_model.modle", "bases.8b.modle"])
def test_an_unknown_key_where_none_can_be_listed_is_still_named(key):
    """Inside what may be absent, or whose names are the user's own."""
    inside = {"model": "x", "modle": "y"}
    if key.startswith("bases"):
        kind, values = settings.Family, FAMILY | {"bases": {"8b": inside}}
    else:
        kind, values = settings.Evaluate, composed("evaluate") | {"base_model": inside}
    with pytest.raises(SettingsError, match=f"unknown key {key}"):
        settings.load(kind, values)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"family": {"name": "f", "bases": {"8b": MODEL}, "base": "8b"}}, "family.small is missing"),
        ({"family": FAMILY | {"base": "huge"}}, "family.base=huge is not one of this family's bases; known: 8b"),
        ({"expert": {"name": "code"}}, "expert: Input should be a valid string"),
        ({"alpha": "abc"}, "alpha='abc': Input should be a valid number, unable to parse string as a number"),
    ],
)
def test_a_refusal_names_the_key_and_repeats_no_whole_section(changes, told):
    with pytest.raises(SettingsError) as refused:
        with_values("evaluate", changes)
    assert str(refused.value) == told


def test_from_is_the_name_of_its_key_everywhere():
    expert = with_values("expert", {"from": "code@v1", "anti": "start"})
    assert expert.from_ == "code@v1" and expert.model_dump()["from"] == "code@v1"
    with pytest.raises(SettingsError, match=r"unknown key form .*'from'"):
        with_values("expert", {"form": "code@v1"})


def test_of_several_experts_the_first_is_what_a_sweep_moves():
    first, other = {"expert": "a@best", "alpha": 0.7}, {"expert": "b@v1", "alpha": 0.4}
    both = with_values("evaluate", {"steering": [first, other]})
    assert (both.expert, both.alpha) == ("a@best", 0.7)
    assert with_values("evaluate", {"steering": [first], "alpha": 2.0}).alpha == 2.0
    assert with_values("evaluate", {"steering": [{"expert": "a"}]}).alpha is None
    assert with_values("evaluate", {"steering": [], "expert": "c@v2", "alpha": 0.1}).expert == "c@v2"
    assert settings.Evaluate(**dict(both)).expert == "a@best"  # from values that are typed already


def test_the_base_is_the_family_s_own_unless_another_is_named():
    assert with_values("evaluate", {"family": FAMILY}).base_ref == settings.ModelRef(**MODEL)
    other = {"model": "org/other", "revision": "abc"}
    assert with_values("evaluate", {"base_model": other}).base_ref == settings.ModelRef(**other)


def test_a_model_is_given_by_its_name_or_with_its_revision():
    given = ("org/name", {"model": "org/name", "revision": "main"})
    refs = [with_values("evaluate", {"base_model": one}).base_ref for one in given]
    assert [(ref.model, ref.revision) for ref in refs] == [("org/name", None), ("org/name", "main")]


def test_tasks_of_the_harness_are_a_list_however_they_are_given():
    for given in ("arc_easy, hellaswag,", ["arc_easy", "hellaswag"]):
        assert with_values("evaluate", {"harness": given}).harness == ["arc_easy", "hellaswag"]
    assert with_values("evaluate", {"harness": None}).harness == []


def test_a_trainer_s_fields_are_those_that_were_given():
    method = settings.Method(**{"name": "sft", "learning_rate": 0.1, "max_length": None, "too_long": "drop"})
    assert method.given() == {"learning_rate": 0.1} and settings.Method().given() == {}


def test_how_the_work_is_done_is_no_part_of_what_decides_the_text():
    plain, fast = settings.Decode(), settings.Decode(batch_size=3, prefill_tokens=7, drafter="none", draft_tokens=2)
    assert plain.content() == fast.content()
    for key, value in {"temperature": 1.0, "seed": 3, "base_top_p": 0.5, "alpha_by": "position"}.items():
        assert settings.Decode(**{key: value}).content() != plain.content()


def test_an_address_loses_its_last_slash():
    assert settings.Remote(**VLLM | {"url": "http://host:8000/v1/"}).url == "http://host:8000/v1"


def test_a_judge_s_address_stays_as_it_is():
    """Its answers are kept by it."""
    assert settings.Judge(url="http://host:8000/v1/").url == "http://host:8000/v1/"


def test_settings_do_not_change_once_they_hold():
    with pytest.raises(ValueError):
        settings.Decode().temperature = 1.0
