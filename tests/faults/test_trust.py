"""What comes from elsewhere runs no code, and what is secret stays where it is."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from proxytune.errors import ProxytuneError
from proxytune.evaluation import judges
from proxytune.experts.card import card
from proxytune.experts.registry import Registry
from proxytune.models import prompts
from proxytune.models.described import describe
from proxytune.models.loading import load_model, load_tokenizer
from proxytune.settings import ModelRef
from tests.experts.hub_server import Hub, Repo, as_the_hub
from tests.models.tiny_family import save_llama, tokenizer
from tests.tracking.surroundings import ROOT, command_lines

HARM = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pathlib.Path({!r}).touch()

class HarmConfig(LlamaConfig):
    model_type = "harm"

class Harm(LlamaForCausalLM):
    config_class = HarmConfig

class HarmTokenizer(PreTrainedTokenizerFast):
    pass
"""
TURNS = [{"role": "user", "content": "hello"}]


class Touch:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def refused(use, *arguments) -> str:
    with pytest.raises(ProxytuneError) as error:
        use(*arguments)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_llama(tmp_path / "model", seed=1)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_pickled_weights_are_refused_and_not_read(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Touch(tmp_path / "ran")}))
    assert str(folder) in refused(load_model, ModelRef(model=str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "org/other"}),
        ("config.json", {"transformers_weights": "adapter_model.bin"}),
        ("config.json", {"transformers_weights": "part/model.safetensors"}),
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": {"lm_head.weight": "adapter_model.bin"}}),
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}),
    ],
)
def test_a_model_whose_files_name_other_weights_is_refused(folder, name, written):
    """No hash of the model covers those, and they may be pickled."""
    shutil.copy(folder / "model.safetensors", folder.parent)
    shutil.copytree(folder, folder / "part")
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
        written["weight_map"] = dict.fromkeys(
            load_file(folder / "part" / "model.safetensors"), *written["weight_map"].values()
        )
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | written))
    assert f"{folder} " in refused(load_model, ModelRef(model=str(folder)))


@pytest.fixture
def harm(folder, tmp_path, monkeypatch) -> Path:
    """What the model of `folder`, with code of its own, leaves behind if that is run. The terminal would allow it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "harm.py").write_text(HARM.format(str(tmp_path / "ran")))
    code = {"AutoConfig": "harm.HarmConfig", "AutoModelForCausalLM": "harm.Harm"}
    change(folder / "config.json", model_type="harm", auto_map=code)
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "harm.HarmTokenizer"]},
        tokenizer_class="HarmTokenizer",
    )
    return tmp_path / "ran"


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: load_model(ModelRef(model=folder)),
        lambda folder: load_tokenizer(ModelRef(model=folder)),  # its own code apart, it may be an ordinary one
        lambda folder: describe(ModelRef(model=folder)),
        lambda folder: judges.classify(folder, ["x"], " yes", 1),
    ],
    ids=["model", "tokenizer", "description", "judge"],
)
def test_code_beside_a_model_is_not_run(use, folder, harm):
    """Not even where whoever sits at the terminal would allow it."""
    with contextlib.suppress(ProxytuneError):
        use(str(folder))
    assert not harm.exists()


def test_code_beside_a_model_is_refused_in_one_line_and_would_run_elsewhere(folder, harm):
    assert str(folder) in refused(load_model, ModelRef(model=str(folder)))
    assert str(folder) in refused(judges.classify, str(folder), ["x"], " yes", 1)
    AutoModelForCausalLM.from_pretrained(str(folder))
    assert harm.exists(), "the terminal's yes"


@pytest.mark.parametrize("size", [1 << 40, (1 << 63) + 5, 100_000_001, 0])
def test_a_header_of_weights_that_claims_too_much_is_refused(folder, size):
    weights = folder / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", size) + weights.read_bytes()[8:])
    assert str(folder) in refused(load_model, ModelRef(model=str(folder)))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{% for i in range(10 ** 10) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ 'a'.index('b') }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% if messages[0].role == 'system' %}{{ 1 / 0 }}{% endif %}{{ messages[0].content.index('b') }}",
    ],
)
def test_a_hostile_chat_template_is_refused_in_one_line(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tokenizer()
    own.chat_template = template
    for turns in (TURNS, [{"role": "system", "content": "x"}, *TURNS]):
        assert "refuses these turns" in refused(prompts.rendered, turns, own)
    assert prompts.end_of_turn(own) is None  # it may read plain text all the same
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch ran']",
        "!!python/name:os.system",
        "{_target_: os.system, command: touch ran}",
        "{_target_: pathlib.Path.touch, self: ran}",
    ],
)
def test_configuration_makes_no_objects(text, tmp_path, monkeypatch, capsys):
    from pipelines import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "decode").mkdir(parents=True)
    (tmp_path / "conf" / "decode" / "mine.yaml").write_text(f"temperature: {text}\n")
    assert cli.main(["decode", "--config-dir", "conf", "decode=mine", "prompt=a"]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and [path.name for path in tmp_path.iterdir()] == ["conf"]


MADE = "{_target_: pathlib.Path.touch, self: {_target_: pathlib.Path, _args_: [ran]}}"


@pytest.mark.parametrize(
    "text",
    [
        f"callbacks: {{mine: {MADE}}}",
        f"sweeper: {{params: {{alpha: [{MADE}]}}}}",
        "job: {env_set: {HF_ENDPOINT: 'http://127.0.0.1:9'}}",
        *(
            f"{name}: {{root: {{handlers: [mine]}}, handlers: {{mine: {{class: logging.FileHandler, filename: ran}}}}}}"
            for name in ("hydra_logging", "job_logging")
        ),
        "callbacks: ${made}",
    ],
)
@pytest.mark.parametrize("how", [["decode=mine"], ["-m", "decode=mine"], ["-m", "decode=greedy,mine"]])
def test_configuration_makes_no_objects_of_hydra_s_own_settings_either(text, how, tmp_path, monkeypatch, capsys):
    from pipelines import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.decode.run", lambda values: None)
    (tmp_path / "conf" / "decode").mkdir(parents=True)
    mine = f"# @package _global_\nhydra:\n  {text}\nmade: {{mine: {MADE}}}\n"
    (tmp_path / "conf" / "decode" / "mine.yaml").write_text(mine)
    assert cli.main(["decode", "--config-dir", "conf", *how, "prompt=a"]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "no configuration makes objects" in told
    assert not (tmp_path / "ran").exists() and "HF_ENDPOINT" not in os.environ


CANARIES = {
    name: f"canary-{number}-{'k3y' * 10}"
    for number, name in enumerate(("HF_TOKEN", "OPENAI_API_KEY", "PROXYTUNE_API_KEY", "ANTHROPIC_API_KEY"))
} | {"WANDB_API_KEY": "c" * 36 + "a11y"}


def test_no_key_reaches_a_file_a_message_or_a_command_line(place, monkeypatch, tmp_path):
    """Stages with keys in their environment and all loggers at debug; and an error, with its traceback."""
    loud = f"import logging, tempfile; logging.basicConfig(level=logging.DEBUG); tempfile.tempdir = {str(tmp_path)!r};"
    shown = []
    place.reset("empty")
    offline = CANARIES | {"WANDB_MODE": "offline"}
    tracked, others = ("expert", "decode", "evaluate", "analyze"), ("report", "export")
    with command_lines() as lines:
        for stage in (*tracked, *others, "show"):
            words = ["registry", "show", "qa"] if stage == "show" else place.words(stage)
            ended, _ = place.run([*words, *["tracker=wandb"] * (stage in tracked)], program=loud, **offline)
            assert ended.code == 0, ended.err
            shown += [ended.out, ended.err]
    # so it was looked at while there was something to see: W&B's own process, of these stages
    assert any("wandb" in line and str(tmp_path) in line for line in lines)
    shown += lines
    bug = "from proxytune.stages import decode; decode.read_prompts = None;"
    ended, _ = place.run(place.words("decode"), program=loud + bug, **offline)
    assert ended.code == 1 and "Traceback" in ended.err
    shown += [ended.out, ended.err]
    for name, canary in CANARIES.items():
        monkeypatch.setenv(name, canary)
    shown.append(card(Registry(place.folder / "outputs" / "registry").resolve("qa"), "org/qa"))
    files = [path for path in place.folder.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files} | {path.name for path in files}
    assert {".wandb", ".html", ".tar", "manifest.json"} <= kinds
    for canary in CANARIES.values():
        assert not [path for path in files if canary.encode() in path.read_bytes()]
        assert not [text for text in shown if canary in text]


def test_a_key_in_a_setting_s_place_is_not_repeated(tmp_path):
    program = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "decode",
        "base=vllm",
        "base.url=http://user:hunter22@host",
        "prompt=a",
    ]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "hunter22" not in done.stderr + done.stdout


SILENT = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI")  # each keeps the library quiet


@pytest.mark.parametrize(("given", "count"), [(None, 0), ("1", 0), ("0", 1)])
def test_no_library_tells_the_hub_that_it_is_used_unless_the_user_wants_it(given, count):
    """TRL's trainers do it in these very words. With a `0` of the user's own it arrives, so the test can fail."""
    program = """
import proxytune
from huggingface_hub.utils import _telemetry
_telemetry.send_telemetry("trl/trainer", library_name="trl", user_agent={"trainer": "SFTTrainer"})
_telemetry._TELEMETRY_QUEUE.join()
"""
    with Hub() as hub:
        known = {key: value for key, value in os.environ.items() if key not in SILENT}
        chosen = {} if given is None else {"HF_HUB_DISABLE_TELEMETRY": given}
        environment = known | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)} | chosen
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len([path for path in hub.seen if "telemetry" in path]) == count


@pytest.mark.parametrize(("given", "asked"), [(None, False), ("0", True)])
def test_a_model_with_pickled_weights_only_is_not_sent_to_be_converted(given, asked, folder, tmp_path, monkeypatch):
    """transformers would look for an earlier conversion, and then send its name and the token to a service."""
    if given is not None:
        monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", given)
    with Hub() as hub:
        as_the_hub(monkeypatch, hub.url, tmp_path / "cache")
        hub.repos["org/pickled"] = repo = Repo(private=False)
        repo.commit({"config.json": (folder / "config.json").read_bytes(), "pytorch_model.bin": b"pickled"}, "one")
        assert "the model org/pickled" in refused(load_model, ModelRef(model="org/pickled"))
        assert any("commits" in path for path in hub.seen) is asked, hub.seen


def test_an_adapter_on_the_hub_is_no_whole_model_and_its_weights_are_not_fetched(folder, tmp_path, monkeypatch):
    with Hub() as hub:
        as_the_hub(monkeypatch, hub.url, tmp_path / "cache")
        hub.repos["org/adapter"] = repo = Repo(private=False)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        repo.commit(files | {"adapter_config.json": b"{}", "adapter_model.bin": b"pickled"}, "one")
        assert "adapter_config.json" in refused(load_model, ModelRef(model="org/adapter"))
        assert not [path for path in hub.seen if path.endswith((".safetensors", ".bin"))]
        repo.commit(files, "two")
        load_model(ModelRef(model="org/adapter"))  # which is a whole one now
