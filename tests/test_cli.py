"""The way in: help, did-you-mean, exit codes, and what Hydra composes."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pipelines import cli, exits, launch
from proxytune import errors, settings
from proxytune.files import resource

CONF = resource("conf")
KINDS = {
    "expert": settings.Expert,
    "doctor": settings.Doctor,
    "decode": settings.DecodeStage,
    "evaluate": settings.Evaluate,
    "sweep": settings.Sweep,
    "analyze": settings.Analyze,
    "demo": settings.Demo,
    "serve": settings.Serve,
    "score": settings.Score,
    "twin": settings.Twin,
    "bench": settings.Bench,
    "pretrain": settings.Pretrain,
}
COMMAND = [sys.executable, "-m", "pipelines.cli"]

# In place of the stages: they tell what they were called with, in whichever process they run.
STAND_IN = """
import os, sys, time, types

def stage(name):
    module = types.ModuleType("proxytune.stages." + name)

    def run(settings):
        prompt = repr(settings.prompt) if name == "decode" else ""
        sys.stdout.write(f"ran {name} {settings.alpha} {settings.tracker.group} {prompt}\\n")  # in one write
        sys.stdout.flush()
        if os.environ.get("STAND_IN") == "sleep":
            time.sleep(30)
        if os.environ.get("STAND_IN") == "flood":
            print("line\\n" * 100_000)
        if settings.alpha == 13:
            from proxytune.errors import ModelError
            raise ModelError("no model fits alpha 13")

    module.run = run
    module.collect = lambda settings, alphas: print("collected", alphas, settings.alpha, settings.command)
    sys.modules[module.__name__] = module

for name in ("decode", "evaluate", "sweep"):
    stage(name)

def load(kind, values):  # no expert is registered
    from proxytune import settings
    return settings.load(kind, values)

from pipelines import named
named.load = load
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder to work in, and an environment in which stages only tell what they were called with."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{Path(__file__).parents[1]}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, **options)


def compose(stage: str, *overrides: str) -> dict:
    import hydra

    with hydra.initialize_config_dir(str(CONF), job_name=stage, version_base="1.3"):
        return launch.plain(hydra.compose(stage, list(overrides)), "proxytune " + stage, None)


def groups_of(stage: str) -> dict[str, list[str]]:
    """The groups that a root names, with their choices."""
    named = [
        entry for entry in yaml.safe_load((CONF / f"{stage}.yaml").read_text())["defaults"] if isinstance(entry, dict)
    ]
    groups = [group for entry in named for group in entry if group not in ("hydra", "experiment")]
    return {group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in groups}


def one_line(text: str) -> str:
    (line,) = text.strip().splitlines()
    assert line.startswith("proxytune: ")
    return line


# Help


def test_the_command_alone_lists_every_stage_with_a_line():
    listed = run()
    assert listed.returncode == 0
    for stage in cli.STAGES:
        assert re.search(rf"^  {stage} +\w.*\.$", listed.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize("stage", cli.STAGES)
def test_help_takes_under_half_a_second(stage):
    def seconds() -> float:
        """Of a processor, so that a busy machine does not count."""
        before = os.times()
        shown = run(stage, "--help")
        assert shown.returncode == 0 and stage in shown.stdout
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert any(seconds() < 0.5 for _ in range(4))


@pytest.mark.parametrize("stage", KINDS)
def test_help_names_every_key_and_every_choice(stage, capsys):
    assert cli.main([stage, "--help"]) == 0
    shown = capsys.readouterr().out
    for key in yaml.safe_load((CONF / f"{stage}.yaml").read_text()):
        assert re.search(rf"^  {key}:", shown, flags=re.MULTILINE)
    for group, choices in groups_of(stage).items():
        assert re.search(rf"^  {group} +{', '.join(map(re.escape, choices))}(  \(default|$)", shown, flags=re.MULTILINE)


def test_help_loads_neither_torch_nor_hydra():
    program = "import sys; from pipelines import cli; cli.main(['evaluate', '--help']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "hydra", "pydantic"} & set(loaded.splitlines()[-1].split())


def test_every_key_of_a_root_is_commented():
    for stage in KINDS:
        keys = (CONF / f"{stage}.yaml").read_text().partition("_self_")[2]
        assert not [
            line
            for line in re.findall(r"^\w+:.*$", keys, flags=re.MULTILINE)
            if "  # " not in line and " # " not in line
        ]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evalute"], "no stage 'evalute' (did you mean 'evaluate'"),
        (["evaluate", "alpa=1"], "unknown key 'alpa' (did you mean 'alpha'"),
        (["evaluate", "taks=code"], "unknown key 'taks' (did you mean 'task'?)"),
        (["evaluate", "experimnt=paper_gsm8k"], "did you mean 'experiment'"),
        (["evaluate", "temperature=1"], "did you mean 'decode.temperature'"),
        (["evaluate", "decode.temperatur=1"], "did you mean 'decode.temperature'"),
        (["evaluate", "+alpa=1"], "unknown key alpa (did you mean 'alpha'"),
        (["evaluate", "wholly_other=1"], "unknown key 'wholly_other' (see proxytune evaluate --help)"),
        (["evaluate", "task=cod"], "no task 'cod' (did you mean 'code'?)"),
        (["evaluate", "-m", "task=code,mth"], "no task 'mth' (did you mean 'math'?)"),
        (["expert", "family=llama"], "no family 'llama' (did you mean 'llama"),
        (["expert", "peft=lra"], "no peft 'lra' (did you mean 'lora'"),
        (["expert", "peft.use_dora=true"], "the expert is no low-rank term beside its anti"),
        (["expert", "method.lerning_rate=1"], "unknown key 'method.lerning_rate' (did you mean 'method.learning_rate'"),
        (["expert", "method.roundz=3"], "'method.rounds' is a key of method=self_rewarding"),
        (["expert", "method=self_rewarding", "method.roundz=3"], "(did you mean 'method.rounds'?)"),
        (["expert", "method=dpo", "method.packing=true"], "'method.packing' is a key of method=sft"),
        (["expert", "experiment=paper_gsm8"], "no experiment 'paper_gsm8' (did you mean 'paper_gsm8k'?)"),
        (["evaluate", "hydra/launcher=jobli"], "did you mean 'joblib'?"),
        (["evaluate", "alpha=nan"], "alpha=nan: Input should be a finite number"),
        (["evaluate", "alpha=inf"], "alpha=inf: Input should be a finite number"),
        (["sweep", "alphas=[0,nan]"], "alphas.1=nan: Input should be a finite number"),
        (["evaluate", "alpha=0,1"], "alpha=0,1 gives several values (add -m"),
        (["analyze", "base=vllm"], "analyze takes no base behind an API (decode, serve, evaluate, sweep and doctor do"),
        (["demo", "base.url=http://127.0.0.1:1"], "demo takes no base behind an API"),
        (["decode", "base=vlm"], "no base 'vlm' (did you mean 'vllm'"),
        (["evaluate", "alpha"], "cannot read 'alpha'"),
        (["evaluate", "steering.expert=code@best"], "steering.expert sets one key of what is a list (give it as a"),
        (["evaluate", "steering=0.5"], "steering=0.5: Input should be a valid list"),
        (["doctor", "base=vllm"], "base.model is not given (add base.model=VALUE)"),
        (["compare"], "required: [NAME=]RUN[,RUN...] (see proxytune compare --help)"),
        (["report"], "required: RUN (see proxytune report --help)"),
        (["report", "x", "--generations", "-1"], "--generations: -1 is below 0 (see proxytune report --help)"),
        (["compare", "x", "--samples", "0"], "--samples: 0 is below 1 (see proxytune compare --help)"),
        (["compare", "x", "--seed", "one"], "--seed: invalid int value: 'one' (see proxytune compare --help)"),
        (["registry", "shw"], "invalid choice: 'shw'"),
        (["sync", "--nope"], "unrecognized arguments: --nope (see proxytune sync --help)"),
        (["evaluate", "alpha=}{"], "cannot read 'alpha=}{'"),
        (["evaluate", "expert=${nowhere}"], "'nowhere' not found"),
        (["evaluate", "--multirn"], "unrecognized arguments: --multirn"),
        (["evaluate", "--config-dir", "/not/there"], "--config-dir /not/there: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    told = capsys.readouterr()
    assert said in one_line(told.err)
    assert (told.out == "" and not list(tmp_path.iterdir())) or "-m" in arguments


def test_each_kind_of_error_has_an_exit_code_of_its_own_and_one_line():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    failures = [exits.of(kind("broken\nin two", "mend it")) for kind in kinds]
    assert len({failure.code for failure in failures} | {exits.PIPE_CLOSED, errors.INTERRUPTED}) == len(kinds) + 2
    assert {failure.text for failure in failures} == {"proxytune: broken in two (mend it)"}


def test_a_full_disk_is_a_storage_error_wherever_it_was_met():
    failure = exits.of(OSError(errno.ENOSPC, "No space left on device", "outputs/points/x.jsonl"))
    assert failure.code == errors.StorageError.exit_code
    assert "outputs/points/x.jsonl" in one_line(failure.text)


def test_a_bug_keeps_its_traceback():
    try:
        {}["gone"]
    except KeyError as error:
        failure = exits.of(error)
    assert failure.code == 1
    assert failure.text.startswith("Traceback") and __file__ in failure.text


@pytest.mark.parametrize("arguments", [[], ["-m", "alpha=0,1"]], ids=["run", "multirun"])
def test_ctrl_c_is_one_line_and_130(arguments, stand_in):
    process = subprocess.Popen(
        [*COMMAND, "evaluate", *arguments],
        env=os.environ | {"STAND_IN": "sleep"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what runs in a shell's background inherits that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline().startswith("ran evaluate")
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 130
    assert one_line(told) == "proxytune: interrupted"


def test_a_reader_that_leaves_early_is_no_error(stand_in):
    line = f"set -o pipefail; {shlex.join([*COMMAND, 'evaluate'])} | head -1"
    piped = subprocess.run(["bash", "-c", line], env=os.environ | {"STAND_IN": "flood"}, capture_output=True, text=True)
    assert piped.stdout.startswith("ran evaluate") and piped.stderr == ""
    assert piped.returncode == exits.PIPE_CLOSED


@pytest.mark.parametrize("everything", [False, True], ids=["stdout", "stderr too"])
def test_output_to_a_full_disk_is_one_line_and_7(everything):
    with open("/dev/full", "w") as full:
        error = full if everything else subprocess.PIPE
        done = subprocess.run([*COMMAND, "--version"], stdout=full, stderr=error, text=True)
    assert done.returncode == errors.StorageError.exit_code
    assert everything or one_line(done.stderr).startswith("proxytune: no space left on the disk")


# What is composed


@pytest.mark.parametrize("stage", KINDS)
def test_every_choice_of_every_group_composes_and_validates(stage):
    groups = groups_of(stage)
    for turn in range(max(map(len, groups.values()), default=1)):
        chosen = [f"{group}={choices[turn % len(choices)]}" for group, choices in groups.items()]
        named = ["base.model=served"] if "base" in groups else []  # some choices leave it to be given
        loaded = settings.load(KINDS[stage], compose(stage, *chosen, *named))
        for override in chosen:
            group, _, choice = override.partition("=")
            if group in ("task", "family", "tracker", "peft", "base"):
                assert getattr(loaded, group).name == choice


@pytest.mark.parametrize("stage", KINDS)
def test_every_setting_is_listed_in_its_root(stage):
    unused = {
        "doctor": {"tracker"},
        "analyze": {"base"},  # a server gives too few scores for what every token lost
        "sweep": {"alpha", "benchmark", "harness", "lm_eval"},
        "demo": {"alpha", "base", "benchmark", "expert", "harness", "lm_eval", "steering"},
    }.get(stage, set())
    # a group that is empty by default is no key until a choice is made
    assert (
        set(compose(stage)) | set(groups_of(stage))
        == {field.alias or name for name, field in KINDS[stage].model_fields.items()} - unused
    )


@pytest.mark.parametrize("file", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_experiment_composes_with_the_stage_that_it_names(file):
    stages = re.findall(rf"proxytune (\w+) experiment={file.stem}", file.read_text())
    assert stages
    for stage in stages:
        settings.load(KINDS[stage], compose(stage, f"experiment={file.stem}"))


def test_a_folder_of_ones_own_adds_choices(tmp_path, capsys):
    (tmp_path / "decode").mkdir()
    (tmp_path / "decode" / "wild.yaml").write_text("defaults: [sample]\ntemperature: 1.5\n")
    assert cli.main(["decode", "--config-dir", str(tmp_path), "decode=wild", "--cfg", "job", "-p", "decode"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["temperature"] == 1.5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "temperature: 1 # caf\xe9".encode("latin-1"),
            "a file is not UTF-8 text (look into the files of --config-dir)",
        ),
        ("temperature: 1".encode("utf-16"), "a file is not UTF-8 text"),
        (b"temperature: 1 # \x01", "mine.yaml"),
        (b"temperature: [", "mine.yaml, line 1 is not plain YAML"),
        (b"defaults: 5", "defaults must be a list"),
        (b"defaults: [mine]", "recursion"),
        (b"temperature: &a [*a]", "cannot be composed"),
    ],
    ids=repr,
)
def test_a_file_of_ones_own_that_cannot_be_read_is_one_line(content, said, tmp_path, capsys):
    (tmp_path / "decode").mkdir()
    (tmp_path / "decode" / "mine.yaml").write_bytes(content)
    assert cli.main(["decode", "--config-dir", str(tmp_path), "decode=mine", "prompt=x"]) == 2
    assert said in one_line(capsys.readouterr().err)


def test_asking_hydra_for_what_it_does_not_have_is_exit_code_2(capsys):
    assert cli.main(["decode", "--cfg", "job", "-p", "nope"]) == 2
    assert capsys.readouterr().err == "package 'nope' not found in config\n"
    assert cli.main(["decode", "--info", "nope"]) == 2
    assert "invalid choice: 'nope'" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("launcher", "key", "value"),
    [("joblib", "n_jobs", 2), ("submitit_local", "timeout_min", 1440), ("submitit_slurm", "timeout_min", 1440)],
)
def test_launchers_take_two_jobs_at_a_time_and_give_them_a_day(launcher, key, value, capsys):
    assert cli.main(["evaluate", f"hydra/launcher={launcher}", "--cfg", "hydra", "-p", "hydra.launcher"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)[key] == value


# What is run


def test_a_stage_leaves_nothing_of_hydra_s_behind(stand_in):
    assert run("evaluate", "alpha=0.5").returncode == 0
    assert [path.name for path in stand_in.iterdir()] == ["site"]


def test_settings_carry_the_command_as_it_could_be_typed_again(monkeypatch):
    seen = []
    monkeypatch.setattr("pipelines.evaluate.run", seen.append)
    arguments = ["evaluate", "expert=code@v1", "task.stop=['a b', \"c\"]"]
    assert cli.main(arguments) == 0
    assert shlex.split(seen[0]["command"]) == ["proxytune", *arguments]


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_multirun_over_alpha_is_gathered_and_has_the_failing_job_s_code(launcher, stand_in):
    done = run("evaluate", "-m", "alpha=0,13,0.5,nan", f"hydra/launcher={launcher}")
    ran = re.findall(r"^ran evaluate (\S+) (\S+)", done.stdout, flags=re.MULTILINE)
    assert sorted(alpha for alpha, _ in ran) == ["0.0", "0.5", "13.0"]
    assert len({group for _, group in ran}) == 1 and ran[0][1].startswith("evaluate-")
    told = done.stderr.splitlines()
    assert told[0] == "proxytune: no model fits alpha 13 [job alpha=13]"
    assert told[1].startswith("proxytune: alpha=nan: ") and len(told) == 2
    assert done.returncode == errors.ModelError.exit_code
    assert done.stdout.count("collected") == 1
    assert "collected [0.0, 0.5] None proxytune evaluate -m" in done.stdout
    assert [path.name for path in (stand_in / "outputs" / "multirun").glob("*/*")] == ["multirun.yaml"]


def test_a_multirun_over_tasks_is_gathered_task_by_task(monkeypatch):
    from pipelines import evaluate

    seen = []
    sweep = SimpleNamespace(collect=lambda values, alphas: seen.append((values.task.name, alphas)))
    monkeypatch.setitem(sys.modules, "proxytune.stages.sweep", sweep)
    monkeypatch.setattr("proxytune.stages.sweep", sweep, raising=False)
    jobs = [("code", 1), ("code", 0), ("math", 0), ("math", 2), ("qa", 1), ("code", None)]
    evaluate.gather(
        [compose("evaluate", f"task={task}", f"alpha={alpha or (0 if alpha == 0 else 'null')}") for task, alpha in jobs]
    )
    assert seen == [("code", [0.0, 1.0]), ("math", [0.0, 2.0])]


NASTY = 'it\'s "quoted", ${home} $HOME $(id) `id` {a: [1, 2]} = 50% \\n #5; rm -rf ~ ¿é?'


@pytest.mark.parametrize(
    ("given", "kept"),
    [(NASTY, NASTY), ("a=b, c", "a=b, c"), ("'a, b'", "a, b"), ('"x"', "x"), ("null", None), ("", "")],
)
def test_a_prompt_is_taken_as_it_stands_unless_wholly_quoted(given, kept, monkeypatch):
    seen = []
    monkeypatch.setattr("pipelines.decode.run", seen.append)
    monkeypatch.setenv("PROXYTUNE_PROMPT", "")
    assert cli.main(["decode", f"prompt={given}"]) == 0
    assert seen[0]["prompt"] == kept


def test_make_hands_a_prompt_through_unharmed(stand_in):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "ARGS"))}
    make = ["make", "-s", "-C", str(CONF.parent), "-o", ".venv/.ready", f"RUN={shlex.join(COMMAND)}"]
    made = subprocess.run(
        [*make, "decode", "ALPHA=0.5", f"PROMPT={NASTY}"], env=environment, capture_output=True, text=True
    )
    assert made.stderr == ""
    assert made.stdout == f"ran decode 0.5 None {NASTY!r}\n"


@pytest.mark.parametrize("stage", cli.STAGES)
def test_a_module_is_the_same_entry_point_as_the_command(stage, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "main", lambda arguments: seen.append(arguments) or 6)
    monkeypatch.setattr(sys, "argv", ["anything", "seed=7", "-m"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(cli.__file__).with_name(f"{stage}.py")), run_name="__main__")
    assert seen == [[stage, "seed=7", "-m"]] and ended.value.code == 6


def test_the_installed_command_prints_what_the_module_prints():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="proxytune")
    assert script.load() is cli.main
    module = subprocess.run([sys.executable, "-m", "pipelines.sweep", "seed=7", "--cfg", "job"], capture_output=True)
    assert module.returncode == 0 and b"seed: 7" in module.stdout
    assert module.stdout.decode() == run("sweep", "seed=7", "--cfg", "job").stdout
