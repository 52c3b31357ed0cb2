"""What a server really does, found out before the first token: a handful of questions whose answers check each other.

A server may say less than its kind usually does: that is noted, and asked for no more. One whose answers contradict
each other, or whose ids mean other tokens, is refused with the name of the test: certificates rest on its scores.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from proxytune.errors import ModelError
from proxytune.models.remote import BudgetSpent, RemoteBase, Unreachable
from proxytune.models.replies import BadReply, Query, Told

WOBBLE = 0.02  # nats that a score may change by when it is asked for again; more is no rounding
ROUGH = 0.5  # nats that a score may change by, once, when its prompt is cached: kernels for weights of few bits do that
SPARED = 6  # tokens of its context that SGLang 0.5 takes no prompt for
SAMPLE = (
    "In 2024, 17 + 25 = 42.",
    "  two  spaces\n\ttab",
    "na\u00efve \u03c0\u4e2d\u6587 \U0001f642",
    "def f(x):\n    return x",
)


@dataclass(frozen=True)
class Finding:
    """One test: `ok`, `no` (the server does not do it) or `open` (it cannot be told), and what was seen."""

    test: str
    outcome: Literal["ok", "no", "open"]
    seen: str


@dataclass(frozen=True)
class Abilities:
    """What may be asked of a server, and how exact it is.

    top, chosen: most scores of each kind. prompt_scores: also inside prompts; chosen_inside: chosen ids there too, and
    beside the best ones. longest: tokens of prompt and reply that it reads at most, None where it does not say.
    """

    top: int
    chosen: int = 0
    prompt_scores: bool = False
    chosen_inside: bool = False
    tolerance: float = 1e-4
    longest: int | None = None


@dataclass(frozen=True)
class Probe:
    """model: what the server says it serves, None if it does not. likeness: the first ids of its answer to the tests'
    prompt, as far as no rounding can swap them: another model under the same name has others."""

    findings: tuple[Finding, ...]
    abilities: Abilities
    model: str | None = None
    likeness: tuple[int, ...] = ()

    def rows(self) -> list[tuple[str, str, str]]:
        """(test, outcome, what was seen), in the order of the tests."""
        return [(found.test, found.outcome, found.seen) for found in self.findings]


async def probe(base: RemoteBase, tokenizer, vocabulary: int, head: int | None = None) -> Probe:
    """Try a server with the trio's own tokenizer and size of vocabulary. Raises ModelError naming a failed test.

    head: the rows of the base's head, where that is known to be more.
    """
    async with base:
        return await _Examiner(base, tokenizer, vocabulary, head or vocabulary).run()


class _Examiner:
    """`ids` is the prompt of all tests, `first` the plain answer to it."""

    def __init__(self, base: RemoteBase, tokenizer, vocabulary: int, head: int):
        self.base, self.tokenizer, self.vocabulary, self.head = base, tokenizer, vocabulary, max(head, vocabulary)
        self.dialect, self.settings = base.dialect, base.settings
        self.ids = tuple(i for i in tokenizer(SAMPLE[0], add_special_tokens=False).input_ids if i < vocabulary)
        self.findings: list[Finding] = []
        self.tolerance = self.settings.tolerance
        self.model: str | None = None

    async def run(self) -> Probe:
        await self._model()
        longest = await self._context()
        self.top = min(self.settings.top, self.vocabulary, self.dialect.most_top or self.vocabulary)
        self.first = await self._must("scores", Query(self.ids, self.top))
        if max(self.first.ids, default=-1) < 0:
            raise self._fail("scores", "its texts are those of no id", "serve a base with the small models' tokenizer")
        self._note("scores", "ok", f"{self.top} best for a prompt of {len(self.ids)} ids, nothing added to it")
        await self._repeated()
        await self._ids_matter()
        most = await self._most_top()
        await self._distribution(most)
        chosen = await self._chosen()
        inside = await self._prompt_scores()
        await self._temperature()
        await self._alters("penalties", self.dialect.penalise())
        await self._bias()
        await self._tokenizer()
        return Probe(
            tuple(self.findings),
            Abilities(
                most, chosen, inside, chosen > 0 and inside and await self._chosen_inside(), self.tolerance, longest
            ),
            self.model,
            _likeness(self.first, self.slack),
        )

    def _note(self, test: str, outcome: Literal["ok", "no", "open"], seen: str) -> None:
        self.findings.append(Finding(test, outcome, seen))

    def _fail(self, test: str, seen: str, hint: str = "its scores cannot be trusted for steering") -> ModelError:
        return ModelError(f"{self.settings.url} failed the {test} test: {seen}", hint)

    async def _must(self, test: str, query: Query) -> Told:
        try:
            return (await self.base.ask(query))[-1]
        except BadReply as bad:
            raise self._fail(test, bad.what.removeprefix(f"{self.settings.url}: ")) from None

    async def _may(self, query: Query) -> list[Told] | None:
        """An answer, or None where the server refuses the question or answers it in another way than its kind does."""
        return await _unless_refused(lambda: self.base.ask(query))

    def _same(self, test: str, one: Told, other: Told, what: str) -> None:
        """Refuse a server whose two answers differ by more than its own rounding; what is less is tolerated."""
        gap = _gap(one, other)
        if gap is None or gap > self.slack:
            raise self._fail(test, what + (f" ({gap:.3g} nats apart)" if gap is not None else " (other tokens)"))
        if gap <= WOBBLE:
            self.tolerance = max(self.tolerance, 2 * gap)

    @property
    def slack(self) -> float:
        """What two scores of one token may differ by, in nats."""
        return max(WOBBLE, self.tolerance)

    async def _model(self) -> None:
        path, names = ("/get_model_info", _model_path) if self.dialect.name == "sglang" else ("/v1/models", _listed)
        reply = await _unless_refused(lambda: self.base.send("GET", path))
        served = names(reply) if reply is not None else []
        if not served:
            return self._note("model", "open", "the server does not say what it serves")
        if self.settings.model is not None and self.settings.model not in served:
            shown = ", ".join(served[:3]) + (", ..." if len(served) > 3 else "")
            raise self._fail("model", f"it serves {shown}", f"give base.model={served[0]}")
        self.model = self.settings.model or served[0]
        self._note("model", "ok", self.model)

    async def _context(self) -> int | None:
        path, told = ("/props", _slot) if self.dialect.name == "llamacpp" else ("/v1/models", _window)
        longest = told(await _unless_refused(lambda: self.base.send("GET", path)), self.model)
        if longest is None:
            self._note("context", "open", "the server does not say how much it reads")
            return None
        if self.dialect.name == "sglang":
            longest -= SPARED
        self._note("context", "ok", f"{longest} tokens of prompt and reply")
        return longest

    async def _repeated(self) -> None:
        """The same prompt has the same scores. They may change once, when it is cached, and must stay then."""
        again = await self._must("rounding", Query(self.ids, self.top))
        gap = _gap(self.first, again)
        rough = gap is not None and WOBBLE < gap <= ROUGH
        if not rough:
            self._same("rounding", self.first, again, "the same prompt was given other scores")
        third = await self._must("rounding", Query(self.ids, self.top))
        self._same("rounding", again, third, "the same prompt was given other scores")
        step = _grid(third.scores)
        self.first, self.tolerance = third, max(self.tolerance, step / 2, 2 * gap if rough else 0)
        shown = f"steps of {step:g}" if step else "full precision"
        same = f"{gap:.2g} nats off once a prompt is cached" if rough else "the same when asked again"
        self._note("rounding", "ok", f"{shown}, {same}; tolerance {self.tolerance:.2g}")

    async def _ids_matter(self) -> None:
        """Other ids must have other scores, and the prompt must be read as ids: else it was read as something else."""
        other = await self._must("token ids", Query(self.ids[::-1], self.top))
        gap = _gap(self.first, other)
        if gap is not None and gap <= self.slack:
            raise self._fail("token ids", "a prompt and its ids in reverse order have the same scores")
        self._note("token ids", "ok", "prompts are read as ids, as many as were sent (no BOS is added)")

    async def _most_top(self) -> int:
        limit = min(self.head, self.dialect.most_top or self.head)
        lists = [limit, *(n for n in (self.vocabulary, 4096, 1024, 256, 100, 50, 20) if self.top < n < limit)]
        for most in sorted(set(lists), reverse=True):
            if most <= self.top:
                break
            found = await self._may(Query(self.ids, most))
            if found:
                self._same("top scores", self.first, found[0], f"a list of {most} has other scores")
                self.most = found[0]
                self._note("top scores", "ok", f"up to {most} of {self.head}")
                return most
        self.most = self.first
        self._note("top scores", "ok" if self.top == limit else "no", f"no more than {self.top}")
        return self.top

    async def _distribution(self, most: int) -> None:
        mass = sum(map(math.exp, self.most.scores))
        if most >= self.vocabulary and not self.dialect.unbounded and mass < 0.98:
            # A head with more rows than the trio shares may hold the rest; the floor says how much at most.
            self._note("probabilities", "open", f"the {most} ids shared have {mass:.4f} of all probability")
        else:
            self._note("probabilities", "ok", f"{most} scores add up to {mass:.4f}")

    async def _chosen(self) -> int:
        limit = self.vocabulary if self.dialect.most_chosen is None else self.dialect.most_chosen
        if not limit:
            self._note("chosen ids", "no", f"{self.dialect.name} has no such request")
            return 0
        within = self.first.ids[-1]
        beyond = [i for i in range(self.vocabulary) if i not in self.first.ids][: min(limit, 8) - 1]
        found = await self._may(Query(self.ids, self.top, (within, *beyond)))
        if not found:
            self._note("chosen ids", "no", "refused, or answered without them")
            return 0
        self._same("chosen ids", self.most, found[0], "asked for by id the scores are others")
        self._note("chosen ids", "ok", f"up to {limit}")
        return limit

    async def _prompt_scores(self) -> bool:
        """Scores inside a prompt must be those that its beginning gets when it is all that is sent."""
        if not self.dialect.prompt_scores:
            self._note("prompt scores", "no", f"{self.dialect.name} has no such request")
            return False
        found = await self._may(Query(self.ids, self.top, positions=3))
        if not found:
            self._note("prompt scores", "no", "refused, or answered without them")
            return False
        for back, told in zip((2, 1), found, strict=False):
            alone = await self._must("prompt scores", Query(self.ids[:-back], self.top))
            self._same("prompt scores", alone, told, "inside a prompt the scores are others than at its end")
        self._same("prompt scores", self.first, found[-1], "with prompt scores the last ones are others")
        self._note("prompt scores", "ok", "the same as at the end of a prompt")
        return True

    async def _chosen_inside(self) -> bool:
        if not self.dialect.chosen_inside:
            return False
        wanted = tuple(i for i in self.most.ids[-3:] if i >= 0)
        found = await self._may(Query(self.ids, self.top, positions=3, beside=wanted))
        if not found:
            self._note("chosen ids inside", "no", "refused, or answered without them")
            return False
        self._same("chosen ids inside", self.most, found[-1], "inside a prompt the scores of chosen ids are others")
        self._note("chosen ids inside", "ok", "also beside the best ones")
        return True

    async def _temperature(self) -> None:
        plain = await self._may(Query(self.ids, self.top, extra={"temperature": 1.0}))
        if plain:
            self._same("temperature", self.first, plain[0], "at temperature 0 the scores are others than at 1")
        await self._alters("temperature", {"temperature": 2.0})

    async def _alters(self, test: str, extra: dict[str, Any]) -> None:
        """Note whether scores are taken before or after a step of sampling. It is sent switched off either way."""
        found = await self._may(Query(self.ids, self.top, extra=extra))
        if not found:
            return self._note(test, "open", "refused, or answered in another way")
        gap = _gap(self.first, found[0])
        before = gap is not None and gap <= self.slack
        self._note(test, "ok", "scores are taken before it" if before else "scores are taken after it; it is sent off")

    async def _bias(self) -> None:
        wanted = next(i for i in reversed(self.most.ids) if i >= 0)
        found = await self._may(Query(self.ids, self.top, extra=self.dialect.bias(wanted)))
        if not found:
            return self._note("bias", "no", "refused, or answered in another way")
        gap = _gap(self.first, found[0])
        where = "before" if gap is not None and gap <= self.slack else "after"
        said = found[0].said == wanted
        self._note("bias", "ok" if said else "no", f"{'honoured' if said else 'ignored'}; scores are taken {where} it")

    async def _tokenizer(self) -> None:
        """The server's ids for a sample of digits, spaces, Unicode and special tokens, id by id."""
        if self.dialect.tokenize is None:
            return self._note(
                "tokenizer", "open", "the server has no such request; ids are trusted by the model's name"
            )
        path, body, key = self.dialect.tokenize
        special = [str(token) for token in self.tokenizer.all_special_tokens][:2]
        for text in (*SAMPLE, *(f"a{token}b" for token in special)):
            reply = await _unless_refused(
                lambda text=text: self.base.send("POST", path, body(text, self.settings.model))
            )
            theirs = reply.get(key) if isinstance(reply, dict) else None
            if not isinstance(theirs, list):
                return self._note("tokenizer", "open", "the server does not say")
            ours = self.tokenizer(text, add_special_tokens=False).input_ids
            if theirs != ours:
                raise self._fail(
                    "tokenizer",
                    f"{text!r} is {_parting(ours, theirs)}",
                    "serve a base that shares the small models' tokenizer",
                )
        self._note("tokenizer", "ok", f"{len(SAMPLE) + len(special)} texts have the same ids")


async def _unless_refused(ask: Callable[[], Awaitable[Any]]) -> Any:
    """An answer; None where the server refuses or cannot be understood. An outage is no refusal."""
    try:
        return await ask()
    except (BudgetSpent, Unreachable):
        raise
    except ModelError:
        return None


def _gap(one: Told, other: Told) -> float | None:
    """The largest difference of a score, for tokens that both must have; None where they have other tokens.

    Texts of several ids are left out: they may be another id's each time.
    """
    first, second = (
        {i: score for i, score in zip(told.ids, told.scores, strict=True) if i >= 0} for told in (one, other)
    )
    if not first or not second:
        return None
    gaps = [abs(first[i] - second[i]) for i in first.keys() & second.keys()]
    # A token that only one has must be one that the other was just above: a tie at the end of the list.
    gaps += [
        max(0.0, score - second_floor)
        for i, score in first.items()
        if i not in second
        for second_floor in [other.floor]
    ]
    gaps += [max(0.0, score - one.floor) for i, score in second.items() if i not in first]
    return max(gaps) if first.keys() & second.keys() else None


def _likeness(told: Told, slack: float) -> tuple[int, ...]:
    """The best ids in order, up to the first two that another answer may swap."""
    apart = [a - b > 2 * slack for a, b in itertools.pairwise(told.scores)]
    return tuple(told.ids[: next((n for n, clear in enumerate(apart) if not clear), len(apart))])


def _grid(scores: Sequence[float]) -> float:
    """The step that all scores are multiples of, 0.1 to 1e-5; 0 where there is none."""
    for digits in range(1, 6):
        if all(abs(score - round(score, digits)) < 1e-12 for score in scores):
            return 10.0**-digits
    return 0.0


def _parting(ours: Sequence[int], theirs: Sequence[Any]) -> str:
    at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"{ours[at : at + 4]} from token {at} on here, {str(theirs[at : at + 4])[:60]} there"


def _entries(reply: Any) -> list[dict[str, Any]]:
    """The models in an answer to /v1/models."""
    entries = reply.get("data") if isinstance(reply, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _listed(reply: Any) -> list[str]:
    """Their names."""
    entries = _entries(reply)
    names = [entry.get("id") for entry in entries] + [name for each in entries for name in each.get("aliases") or []]
    return [name for name in names if isinstance(name, str)]


def _window(reply: Any, model: str | None) -> int | None:
    """The context of that model, as vLLM and SGLang tell it in /v1/models; of the first where none has the name."""
    entries = sorted(_entries(reply), key=lambda entry: entry.get("id") != model)
    return _length(entries[0].get("max_model_len")) if entries else None


def _slot(reply: Any, model: str | None) -> int | None:
    """The context of each of llama.cpp's slots, in /props."""
    settings = reply.get("default_generation_settings") if isinstance(reply, dict) else None
    return _length(settings.get("n_ctx")) if isinstance(settings, dict) else None


def _length(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _model_path(reply: Any) -> list[str]:
    path = reply.get("model_path") if isinstance(reply, dict) else None
    return [path] if isinstance(path, str) else []
