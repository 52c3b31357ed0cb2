"""What is asked of the loop, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TypeVar

from proxytune.decoding.mixture import Mixture, Prompts
from proxytune.errors import SettingsError
from proxytune.settings import Decode
from proxytune.steering.choice import GREEDY, Sampling
from proxytune.steering.variants import EQUATION, Variant

R = TypeVar("R", bound="Reply")


@dataclass(frozen=True)
class Limits:
    """When a reply ends: after max_new_tokens, at an id of end_ids, or before the first stop string.

    Before min_new_tokens no end id is said and no stop string is looked for. A model's own context ends it too.
    banned: ids that are never said.
    """

    max_new_tokens: int
    end_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    banned: frozenset[int] = frozenset()

    @cached_property
    def reach(self) -> int:
        """The ids from the end of a reply that hold any stop string its last id completes.

        An id stands for a byte or more, but for special ones and for spaces that a tokenizer cleans away: hence twice
        the bytes, and some.
        """
        return 16 + 2 * max((len(stop.encode()) for stop in self.stop), default=0)

    @cached_property
    def lasts(self) -> frozenset[str]:
        return frozenset(stop[-1] for stop in self.stop if stop)

    def may_end(self, piece: str) -> bool:
        """Whether an id of this text can complete a stop string: it brings the last character of one, or may do so in
        its place (half a character; a space, which tokenizers cut from the text of a single id)."""
        return "\ufffd" in piece or " " in self.lasts or not self.lasts.isdisjoint(piece)


@dataclass(frozen=True)
class Request:
    """One reply to write. `alphas` has one number for each pair of the mixture.

    logprobs: how many of the likeliest ids are told at each position, beside the one that is said; 0 tells nothing.
    """

    prompts: Prompts
    limits: Limits
    alphas: tuple[float, ...] = ()
    sampling: Sampling = GREEDY
    variant: Variant = EQUATION
    logprobs: int = 0


def fitted(request: Request, mixture: Mixture, longest: int | None) -> Request:
    """The request with its limits cut to the room that its prompts leave in contexts of `longest` ids.

    Raises SettingsError where alphas do not match the mixture's pairs, or a prompt is empty or leaves no room at all,
    DataError where it has an id that a model cannot read.
    """
    if len(request.alphas) != len(mixture.pairs):
        what = f"{len(request.alphas)} alphas are given for {len(mixture.pairs)} experts"
        raise SettingsError(what, "give one each")
    if not all(request.prompts[term.role] for term in mixture.terms):
        raise SettingsError("a prompt has no tokens", "give each model at least one to begin with")
    mixture.check(request.prompts)
    if longest is None:
        return request
    prompt = max(len(request.prompts[term.role]) for term in mixture.terms)
    if prompt >= longest:
        raise SettingsError(f"a prompt has {prompt} tokens and the models read {longest}", "shorten the prompt")
    most = min(request.limits.max_new_tokens, longest - prompt)
    return replace(request, limits=replace(request.limits, max_new_tokens=most))


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities, in nats, of some ids at one position of a reply.

    ids: the one said, the one that the base would say here by the same rules and noise, then the likeliest by steered
    scores, best first. steered: of each of ids, before penalties, bans and temperature. alone: the same of each model
    by itself, by its role.
    """

    ids: tuple[int, ...]
    steered: tuple[float, ...]
    alone: Mapping[str, tuple[float, ...]]


@dataclass
class Reply:
    """`token_ids` holds every emitted id, the end token included; `text` is cut at a stop string.

    finish_reason: `stop` (an end token or a stop string), `length`, `cancelled`, `error`, or None while it grows.
    logprobs: one for each of token_ids where the request asks for them, else empty. error: why it could not go on.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: Exception | None = None

    def fail(self, error: Exception) -> None:
        self.error, self.finish_reason = error, "error"

    def append(self, token: int, limits: Limits, tokenizer) -> None:
        """One more token; sets finish_reason, and text with it, when that was the last."""
        self.token_ids.append(token)
        count = len(self.token_ids)
        if token in limits.end_ids and count > limits.min_new_tokens:
            self.finish_reason = "stop"
        elif count >= limits.max_new_tokens:
            self.finish_reason = "length"
        looks = limits.stop and count > limits.min_new_tokens
        if not (looks or self.finish_reason):
            return
        first = count == limits.min_new_tokens + 1  # one may stand in what was said before any was looked for
        if not (self.finish_reason or first or self._stops(token, limits, tokenizer)):
            return
        text = self.text_so_far(limits, tokenizer)
        cuts = [at for stop in limits.stop if (at := text.find(stop)) >= 0] if looks else []
        if cuts:
            text, self.finish_reason = text[: min(cuts)], "stop"
        if self.finish_reason:
            self.text = text

    def _stops(self, token: int, limits: Limits, tokenizer) -> bool:
        """Whether the last id may have completed a stop string; the end of the reply tells, not its whole text."""
        if not limits.may_end(piece(tokenizer, token)):
            return False
        end = tokenizer.decode(self.token_ids[-limits.reach :], skip_special_tokens=True)
        return any(stop in end for stop in limits.stop)

    def text_so_far(self, limits: Limits, tokenizer) -> str:
        """The text of the ids so far, without the end token; other special tokens are left out."""
        return tokenizer.decode(said(self.token_ids, limits), skip_special_tokens=True)


def finished(
    found: Sequence[tuple[int, R]], places: Mapping[int, int], on_token: Callable[[int, Reply], None] | None
) -> Iterator[tuple[int, R]]:
    """The replies that a round ended, by their requests' places; then the first error of one that could not go on."""
    for handle, reply in found:
        if on_token and not reply.error:
            on_token(places[handle], reply)
        if reply.finish_reason and not reply.error:
            yield places[handle], reply
    for _, reply in found:
        if reply.error:
            raise reply.error


@lru_cache(maxsize=1 << 20)
def piece(tokenizer, token: int) -> str:
    """The text of an id by itself."""
    return tokenizer.decode([token], skip_special_tokens=True)


def said(token_ids: Sequence[int], limits: Limits) -> Sequence[int]:
    """The ids without the end token."""
    return token_ids[:-1] if token_ids and token_ids[-1] in limits.end_ids else token_ids


def sampling(decode: Decode, place: int) -> Sampling:
    """How the reply to the prompt at this place is chosen: each prompt has a seed of its own."""
    return Sampling(
        temperature=decode.temperature,
        top_k=decode.top_k,
        top_p=decode.top_p,
        min_p=decode.min_p,
        repetition_penalty=decode.repetition_penalty,
        seed=decode.seed + place,
    )


def variant(decode: Decode) -> Variant:
    return Variant(base_top_p=decode.base_top_p, alpha_by=decode.alpha_by, alpha_steps=decode.alpha_steps)
