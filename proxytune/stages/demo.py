"""The whole job on one family: tune, register, steer, compare, choose alpha, measure, draw."""

from __future__ import annotations

from proxytune.errors import RegistryError
from proxytune.experts.registry import Registry
from proxytune.settings import DecodeStage, Demo, Evaluate, Expert, S, Steering, Sweep
from proxytune.stages import decode, evaluate, expert, sweep
from proxytune.stages.evaluate import Found
from proxytune.stages.shared import trio as trios
from proxytune.stages.shared.start import dataset

SHOWN = 10  # lines of a reply: an untuned base goes on to its last token


def run(settings: Demo) -> Found:
    """Run every stage in turn and end with the table on test rows and the path of its summary.

    An expert or a tuned base that an earlier run registered with the same settings is used again.
    """
    _say(1, f"tune the small model on {settings.task.name}: the expert")
    small = _trained(settings, "small")
    _say(2, "tune the base itself, only to compare: what steering tries to reach without touching the base")
    _trained(settings, "base")
    _say(3, "choose alpha on validation rows")
    settings = settings.model_copy(update={"expert": small})
    sweep.run(_part(Sweep, settings, generate=False))
    _say(4, "the same prompts to the base, the expert and the steered base")
    _compare(settings)
    _say(5, "measure on test rows")
    return evaluate.run(_part(Evaluate, settings, split="test", alpha=None, alphas=[]))


def _trained(settings: Demo, model: str) -> str:
    part = _part(Expert, settings, model=model)
    if model == "base" and settings.base_model is not None:  # the ceiling is of the base that is steered
        family = settings.family.model_copy(update={"bases": {"base_model": settings.base_model}, "base": "base_model"})
        part = part.model_copy(update={"family": family})
    config = part.model_dump(mode="json", exclude={"command", "tracker"})
    registry = Registry(settings.outputs / "registry")
    for other in reversed(registry.experts()):
        if {key: value for key, value in other.manifest.config.items() if key != "tracker"} == config:
            try:
                registry.verify(other)
            except RegistryError:
                continue
            print(f"{other.reference} was tuned with these settings before")
            return other.reference
    return expert.run(part).reference


def _compare(settings: Demo) -> None:
    """Side by side, on the first test rows."""
    rows = dataset(settings).rows["test"]
    part = _part(DecodeStage, settings, compare=True)
    found = trios.find(part)
    experts, trio = [(found, trios.alpha_of(part, found))], trios.load(part, found, ())
    asked = [{"id": row["id"], "prompt": row["prompt"]} for row in rows[: settings.examples]]
    systems = ("base", "expert", "steered")
    replies = [reply for system in systems for reply in decode.write(part, trio, experts, system, asked)]
    decode.show(asked, replies, lines=SHOWN)


def _part(kind: type[S], settings: Demo, **changes) -> S:
    """The settings of one stage out of the demo's, which has all of them."""
    values = {name: getattr(settings, name) for name in kind.model_fields if hasattr(settings, name)}
    if issubclass(kind, Steering):
        values |= {"expert": settings.expert}
    return kind(**(values | changes))


def _say(step: int, what: str) -> None:
    from proxytune.analysis import tables

    tables.console().rule(f"[bold]{step}[/bold]  {what}", align="left")
