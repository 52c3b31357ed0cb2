"""Self-rewarding training (Yuan et al. 2024, arXiv 2401.10020): a model that is tuned on what it prefers itself.

    M1   the family's model tuned on rows, and on judging where it will judge itself
    M2   M1 tuned by preferences among its own answers, with M1 as reference; M3 the same from M2, and so on

A round proposes prompts, answers each several times, has the answers judged, and pairs the best with the worst. Each
of these steps leaves a file, and a command that is given again goes on after the last one:

    outputs/self_rewarding/<name>-<hash>/
      seed/      train.jsonl validation.jsonl test.jsonl: what M1 is tuned on, and what nobody may be
      round-1/   proposals.jsonl prompts.jsonl answers.jsonl judgements.jsonl pairs.jsonl yield.json
      summary.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proxytune.evaluation.rubric import MOST, Rubric, verdict
from proxytune.experts.fields import configure
from proxytune.experts.registry import Expert, Registry, check_name
from proxytune.experts.self_rewarding import seed
from proxytune.files import hash_json, locked, read_jsonl, remove_folder
from proxytune.models.quiet import quiet
from proxytune.settings import Data, Method, load
from proxytune.settings import Expert as Settings
from proxytune.settings.self_rewarding import Chosen, SelfRewarding, Trained, Trainings
from proxytune.stages.self_rewarding import iterates
from proxytune.stages.self_rewarding.loop import Loop, divided, once
from proxytune.stages.self_rewarding.rounds import play
from proxytune.stages.shared.start import dataset, limit_threads, warn
from proxytune.tasks import catalog, rowfiles
from proxytune.tasks.task import SPLITS, Row

VERSION = 1  # raise when the same settings come to mean other files


def run(settings: Settings) -> Expert:
    """Tune the seed and every round after it; return the last iterate. Registered are `<name>-m1`, `-m2`, ..."""
    limit_threads(settings)
    loop = prepare(settings)
    with locked(loop.work.with_name(f"{loop.work.name}.lock")):
        if not settings.resume:
            remove_folder(loop.work)
        made = [_seed(loop)]
        yields = []
        for number in range(1, loop.plan.rounds + 1):
            yields.append(play(loop, number, made[-1]))
            made.append(_tuned(loop, number, made[-1]))
        iterates.told(loop, made, yields)
    return made[-1]


def prepare(settings: Settings) -> Loop:
    plan = load(Chosen, {"method": settings.method.model_dump(exclude_unset=True, exclude={"name"})}).method
    _trainings(plan)  # a wrong one is told before anything is made
    task = catalog.get(settings.task.name)
    name = settings.name or (task.name if settings.model == "small" else f"{task.name}-tuned")
    check_name(f"{name}-m{plan.rounds + 1}")
    if settings.from_ is not None:
        start_of = Registry(settings.outputs / "registry").resolve(settings.from_)
        settings = settings.model_copy(update={"from_": start_of.reference})
    data = dataset(settings)
    warn(data)
    data.held("train")
    path = plan.judge_rows
    scored = rowfiles.read_each(path, lambda raw: seed.read(raw, MOST)) if path else None
    said = [Rubric(plan.judge.template).template, scored]
    how = settings.model_dump(
        mode="json", include={"family", "task", "peft", "launch", "model", "anti", "from_", "seed"}
    )
    content = [VERSION, name, plan.model_dump(mode="json", exclude={"batch_size"}), how, data.fingerprint, said]
    label = f"{settings.tracker.group or 'self-rewarding'}-{hash_json(content)[:6]}"
    settings = settings.model_copy(update={"tracker": settings.tracker.model_copy(update={"group": label})})
    work = settings.outputs / "self_rewarding" / f"{name}-{hash_json(content)[:16]}"
    return Loop(settings, plan, task, data, scored, name, work)


def _trainings(plan: SelfRewarding) -> Trainings:
    return load(Trained, {"method": {"sft": plan.sft, "dpo": plan.dpo}}).method


def _seed(loop: Loop) -> Expert:
    """M1."""
    folder = loop.work / "seed"
    rows, _ = divided(loop)
    once(folder / "train.jsonl", lambda: [*rows, *_judging(loop, rows)])
    for split in SPLITS[1:]:
        if loop.data.rows[split]:
            once(folder / f"{split}.jsonl", lambda split=split: loop.data.rows[split])
    validation = folder / "validation.jsonl"
    changes = {"from_": loop.settings.from_, "anti": loop.settings.anti}
    return _registered(loop, 1, folder / "train.jsonl", validation, _trainings(loop.plan).sft, changes)


def _judging(loop: Loop, rows: list[Row]) -> list[Row]:
    """Rows to learn judging from, where the model is to judge itself."""
    if loop.plan.judge.by != "self":
        return []
    scored = seed.made_of(rows) if loop.scored is None else loop.scored
    chat = not isinstance(rows[0]["prompt"], str)
    return seed.rows(scored, chat, Rubric(loop.plan.judge.template).question, verdict)


def _tuned(loop: Loop, number: int, before: Expert) -> Expert:
    """The iterate after `before`, which is where it starts and its reference."""
    method = _trainings(loop.plan).dpo
    changes = {"from_": before.reference, "anti": "original"}
    return _registered(loop, number + 1, loop.work / f"round-{number}" / "pairs.jsonl", None, method, changes)


def _registered(
    loop: Loop, number: int, train: Path, validation: Path | None, method: Method, changes: dict[str, Any]
) -> Expert:
    """Tune on a file of rows and register; or the version that was tuned on this very file before."""
    from proxytune.stages import expert as stage

    held = {"validation": validation, "test": loop.work / "seed" / "test.jsonl"}
    named = {split: str(path) if path is not None and path.is_file() else None for split, path in held.items()}
    data = Data(source="files", train=str(train), validation=named["validation"], test=named["test"])
    settings = loop.settings.model_copy(
        update={"method": method, "data": data, "name": f"{loop.name}-m{number}", **changes}
    )
    wanted = settings.model_dump(mode="json", include={"data", "method", "from_", "anti", "model", "seed"})
    registry = Registry(settings.outputs / "registry")
    for version in reversed(registry.versions(f"{loop.name}-m{number}") if loop.settings.resume else []):
        known = registry.resolve(f"{loop.name}-m{number}@v{version}")
        if all(known.manifest.config.get(key) == value for key, value in wanted.items()):
            registry.verify(known)
            return known
    if number == 1:
        _check_fields(loop)
    read_jsonl(train)  # for its checksums: what trains takes rows of any file
    for stale in (loop.work / f"round-{number}").glob("*.json*"):  # of an iterate that is no more
        stale.unlink()
    return stage.run(settings)


def _check_fields(loop: Loop) -> None:
    """SettingsError for a field of any of the trainings now, and not after the first round's answers."""
    trainings, defaults = _trainings(loop.plan), loop.settings.family.training
    with quiet():
        for method in (trainings.sft, trainings.dpo):
            configure(method, loop.work, seed=loop.settings.seed, evaluate=True, defaults=defaults)
