"""What the server counts, in Prometheus's text form."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from proxytune.decoding.remote import Counts
from proxytune.serving.loop import Loop

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """requests: answers by route and status. seconds: from a generation's arrival to its end, by model."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.prompt_tokens: Counter[str] = Counter()
        self.completion_tokens: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.generations: Counter[str] = Counter()

    def text(self, loop: Loop) -> str:
        return "".join(f"{line}\n" for line in self._lines(loop))

    def _lines(self, loop: Loop) -> Iterator[str]:
        stats = {name: engine.stats for name, engine in loop.engines.items()}
        yield from _head("requests_total", "counter", "Answers by route and HTTP status.")
        for (route, status), count in sorted(self.requests.items()):
            yield f'proxytune_requests_total{{route="{_label(route)}",status="{status}"}} {count}'
        yield from _each("prompt_tokens_total", "counter", "Tokens of prompts read.", self.prompt_tokens)
        yield from _each("completion_tokens_total", "counter", "Tokens of replies handed out.", self.completion_tokens)
        yield from _each("generation_seconds_sum", "counter", "Seconds from arrival to end.", self.seconds)
        yield from _each("generation_seconds_count", "counter", "Generations that ended.", self.generations)
        rows = {name: len(engine.rows.each) for name, engine in loop.engines.items()}
        waiting = {name: max(0, loop.open[name] - rows[name]) for name in rows}
        yield from _each("rows", "gauge", "Replies being written.", rows)
        yield from _each("waiting", "gauge", "Replies that wait for a place.", waiting)
        yield from _each("engine_rounds_total", "counter", "Rounds.", {n: s.rounds for n, s in stats.items()})
        yield from _each("engine_tokens_total", "counter", "Tokens written.", {n: s.tokens for n, s in stats.items()})
        drafted = {name: each.drafted for name, each in stats.items()}
        accepted = {name: each.accepted for name, each in stats.items()}
        yield from _each("engine_drafted_total", "counter", "Drafted tokens that were looked at.", drafted)
        yield from _each("engine_accepted_total", "counter", "Drafted tokens that held.", accepted)
        if away := {name: each for name, each in stats.items() if isinstance(each, Counts)}:  # a base behind an API
            certified = {name: each.certified for name, each in away.items()}
            yield from _each("engine_certified_total", "counter", "Tokens written that are certified.", certified)
            calls = {name: each.calls for name, each in away.items()}
            yield from _each("engine_calls_total", "counter", "Questions to the base's server.", calls)
        for name, what, value in (
            ("cancelled_total", "Replies that nobody waited for.", loop.cancelled),
            ("failures_total", "Rounds that failed.", loop.failures),
        ):
            yield from _head(name, "counter", what)
            yield f"proxytune_{name} {value}"


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP proxytune_{name} {what}"
    yield f"# TYPE proxytune_{name} {kind}"


def _each(name: str, kind: str, what: str, values) -> Iterator[str]:
    yield from _head(name, kind, what)
    for model, value in sorted(values.items()):
        yield f'proxytune_{name}{{model="{_label(model)}"}} {value}'


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
