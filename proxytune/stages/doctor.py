"""Look at a trio before a long run: does it fit together, what does each model read, does it fit into memory.

Headers and tokenizers say most of it. Only where they find no fault are weights loaded, for one forward of each model
(`forward=false` leaves that out), and with `effect=true` for a measurement. Every other check is made whatever the
others found; the first fault is raised at the end, so that its kind is the exit code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

from proxytune.errors import ModelError, ProxytuneError, SettingsError, TrioError
from proxytune.experts.registry import Expert
from proxytune.models import prompts
from proxytune.models import trio as models
from proxytune.models.described import Described, describe
from proxytune.models.loading import load_tokenizer
from proxytune.models.members import separable
from proxytune.models.prompts import Format, Turns
from proxytune.models.vocabulary import Vocabulary, shared
from proxytune.settings import Doctor, ModelRef
from proxytune.stages.shared import memory
from proxytune.stages.shared import trio as trios
from proxytune.stages.shared.start import dataset, limit_threads
from proxytune.tasks import catalog

SHOWN = 400  # characters of a prompt


def run(settings: Doctor) -> dict[str, list[str]]:
    """Print what was found, and return it by check. Raises the first fault."""
    limit_threads(settings)
    patient, found = Patient(settings), {}
    faults = patient.faults
    for name, look in CHECKS.items():
        lines, fault = [], None
        try:
            for line in look(patient):
                lines.append(line)
        except ProxytuneError as error:
            lines.append("not looked at, since the above" if error in faults else str(error))
            fault = error
            faults.append(error)
        if lines:
            found[name] = lines
            _print(name, lines, fault)
    if faults:
        raise faults[0]
    return found


def _print(name: str, lines: list[str], fault: ProxytuneError | None) -> None:
    mark = "FAULT" if fault else "ok"
    for number, line in enumerate(lines):
        print(f"{mark if number == 0 else '':<6}{name if number == 0 else '':<12}{line}", flush=True)


class Patient:
    """What the checks look at, each part read when first asked for. Without an expert, the family's small model."""

    def __init__(self, settings: Doctor):
        self.settings = settings
        self.faults: list[ProxytuneError] = []  # of the checks so far
        self._known: dict[str, Any] = {}

    @property
    def experts(self) -> list[Expert]:
        return self._once(
            "experts", lambda: [trios.find(self.settings), *(expert for expert, _ in trios.held(self.settings))]
        )

    @property
    def refs(self) -> dict[str, ModelRef]:
        """By role, an expert's own files under its reference."""
        found = {"base": self.settings.base_ref}
        try:
            experts = self.experts
        except ProxytuneError:
            return found | {"small": self.settings.family.small}
        for expert in experts:
            anti = expert.manifest.anti
            found[f"anti of {expert.reference}"] = ModelRef(model=anti.model, revision=anti.revision)
            found[expert.reference] = ModelRef(model=str(expert.folder))
        return found

    @property
    def tokenizers(self) -> dict[str, Any]:
        return self._once("tokenizers", lambda: {role: load_tokenizer(ref) for role, ref in self.refs.items()})

    @property
    def described(self) -> dict[str, Described]:
        """Of each role; the base behind an API has no weights here."""
        away = {"base"} if self.settings.base is not None else set()
        return self._once(
            "described", lambda: {role: describe(ref, weights=role not in away) for role, ref in self.refs.items()}
        )

    @property
    def vocabulary(self) -> Vocabulary:
        return self._once("vocabulary", self._shared)

    def _shared(self) -> Vocabulary:
        known = {role: tokenizer.get_vocab() for role, tokenizer in self.tokenizers.items()}
        return shared({role: (ids, self.rows(role) or max(ids.values()) + 1) for role, ids in known.items()})

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """What cannot be had is not looked for again: without a network that takes long."""
        if name not in self._known:
            try:
                self._known[name] = make()
            except ProxytuneError as error:
                self._known[name] = error
        if isinstance(self._known[name], ProxytuneError):
            raise self._known[name]
        return self._known[name]

    def rows(self, role: str) -> int | None:
        """Of a model's head, as its configuration has it."""
        return getattr(self.described[role].text, "vocab_size", None)

    def format(self, role: str) -> Format:
        chosen = next((e for e in self.experts if e.reference == role), None) if "@" in role else None
        return chosen.manifest.prompt_format if chosen else "plain"

    def prompt(self) -> Turns:
        if self.settings.prompt is not None:
            return self.settings.prompt
        return dataset(self.settings).held("validation")[0]["prompt"]


def lineage(patient: Patient) -> Iterator[str]:
    for expert in patient.experts:
        anti = expert.manifest.anti
        models.check_anti(
            trios.files_of(expert),
            ModelRef(model=anti.model, revision=anti.revision),
            patient.tokenizers[f"anti of {expert.reference}"],
        )
        kind = "a LoRA adapter of" if expert.manifest.kind == "lora" else "tuned from"
        yield f"{expert.reference}: {kind} {anti.model}, whose weights ({anti.weights[:12]}) are the very same"
        alpha = expert.manifest.alpha
        chosen = "alpha 1, since no sweep has chosen one" if alpha is None else f"alpha {alpha:g}, as a sweep chose it"
        yield f"tuned on {expert.manifest.task} rows, {expert.manifest.prompt_format}; {chosen}"


def vocabulary(patient: Patient) -> Iterator[str]:
    found = patient.vocabulary
    foreign = f", but for {len(found.foreign)} that are never said" if found.foreign else ""
    yield f"{found.size:,} ids mean the same token in all models{foreign}"
    heads = {role: patient.rows(role) for role in patient.refs}
    wider = [f"{role} has {rows:,} rows" for role, rows in heads.items() if rows and rows > found.size]
    if wider:
        yield f"rows of heads beyond that are left out: {', '.join(wider)}"


def ends(patient: Patient) -> Iterator[str]:
    tokenizers, described = patient.tokenizers, patient.described
    speaking = [each for role, each in tokenizers.items() if not role.startswith("anti")]
    ids = prompts.end_ids(speaking, [each.generation for each in described.values()])
    base = tokenizers["base"]
    yield f"replies end at {', '.join(f'{base.convert_ids_to_tokens(i)!r} ({i})' for i in sorted(ids))}"
    if lost := [i for i in sorted(ids) if i not in patient.vocabulary]:
        yield f"of these {lost} cannot be said, since not all models know them"
    for role, tokenizer in tokenizers.items():
        first = (tokenizer("a").input_ids or [None])[0]
        begins = tokenizer.bos_token if first is not None and first == tokenizer.bos_token_id else "nothing"
        yield f"{role}: {begins} is put before a prompt; end {tokenizer.eos_token!r}, padding {tokenizer.pad_token!r}"


def caps(patient: Patient) -> Iterator[str]:
    found = {role: each.soft_cap for role, each in patient.described.items() if each.config is not None}
    if not any(found.values()):
        yield "no model caps its scores"
    elif len(set(found.values())) == 1:
        yield f"all cap their scores at {next(iter(found.values())):g}, so they are mixed as they are"
    elif patient.settings.base and found.get("base"):
        raise TrioError(
            f"the served base caps its scores at {found['base']:g} and the small models do otherwise",
            "load the base here, or use small models of its family",
        )
    else:
        capped = ", ".join(f"{role} at {cap:g}" for role, cap in found.items() if cap)
        yield f"capped: {capped}; undone before the models are mixed"


def asked(patient: Patient) -> Iterator[str]:
    prompt = patient.prompt()
    for role, tokenizer in patient.tokenizers.items():
        ids = prompts.encode(prompt, tokenizer, patient.format(role))
        text = tokenizer.decode(ids)
        cut = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} [...] {text[-SHOWN // 2 :]}"
        yield f"{role} ({patient.format(role)}, {len(ids)} ids): {cut!r}"


def fits(patient: Patient) -> Iterator[str]:
    settings = patient.settings
    reply = trios.limits(settings, catalog.get(settings.task.name)).max_new_tokens
    yield from memory.told(settings, patient.refs, patient.described, _adapters(patient), reply)


def _adapters(patient: Patient) -> dict[str, tuple[str, bool]]:
    """Experts that are adapters: the role of the model under each, and whether it is merged into a copy of it."""
    try:
        experts = [expert for expert in patient.experts if expert.manifest.kind == "lora"]
    except ProxytuneError:
        return {}
    return {e.reference: (f"anti of {e.reference}", not separable(e.folder)) for e in experts}


def forward(patient: Patient) -> Iterator[str]:
    """One reading of the prompt by each model that is here. ModelError where scores are no numbers."""
    settings = patient.settings
    if not settings.forward:
        return
    if patient.faults:
        raise patient.faults[0]
    import torch

    trio = trios.load(settings, patient.experts[0], trios.held(settings))
    asked = trio.encode(patient.prompt())
    for term in dict.fromkeys([*([trio.local] if trio.local else []), *(term for pair in trio.pairs for term in pair)]):
        ids = list(asked[term.role])[-(term.source.longest or len(asked[term.role])) :]
        began = perf_counter()
        with torch.inference_mode():
            stream = term.source.open(1, len(ids), (term.member,))
            scores_V = stream.read(torch.tensor([[ids]]), torch.zeros(1, 1, dtype=torch.int64))[0, 0, -1].float()
        token = int(scores_V.argmax())
        if not scores_V[token].isfinite():
            raise ModelError(
                f"{term.role} gives NaN or infinity after the prompt", "load it in float32: family.dtype=float32"
            )
        text, share = trio.tokenizers["base"].decode([token]), float(scores_V.softmax(-1)[token])
        yield f"{term.role}: {len(ids)} ids in {perf_counter() - began:.2g} s; likeliest next {text!r} ({share:.1%})"


def server(patient: Patient) -> Iterator[str]:
    if patient.settings.base is None:
        return
    from proxytune.decoding import served

    found = served.reach(patient.settings.base, patient.tokenizers["base"], patient.vocabulary.size)
    for test, outcome, seen in found.probe.rows():
        yield f"{outcome:<5}{test}: {seen}"
    spent = found.base.spent
    yield f"the tests took {spent.requests} requests and {spent.tokens} tokens"


def effect(patient: Patient) -> Iterator[str]:
    if not patient.settings.effect:
        return
    if patient.settings.base is not None:
        raise SettingsError(
            "effect=true needs the base's scores for the whole vocabulary, and an API gives a few",
            "leave base= out, or leave effect= out and compare replies: proxytune decode compare=true",
        )
    if patient.faults:
        raise patient.faults[0]
    from proxytune.stages import effect as effects

    yield from effects.told(patient.settings, patient.experts[0])


CHECKS: dict[str, Callable[[Patient], Iterator[str]]] = {
    "lineage": lineage,
    "vocabulary": vocabulary,
    "ends": ends,
    "soft caps": caps,
    "prompts": asked,
    "memory": fits,
    "server": server,
    "forward": forward,
    "effect": effect,
}
