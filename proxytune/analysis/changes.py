"""What steering changed, token by token: the content of `tokens.json`, made of records (analysis/tokens.py).

    overall       share of positions whose likeliest token changed, gain (steered minus base probability of the token
                  that was said), kl of steered from base in nats, and how often the base likes the token best
    by_position   the same in bands of positions, by_class by kind of token (analysis/classes.py)
    differences   of the mean gain between kinds within a reply, on average over replies, with a sign-flip test
    promoted      tokens that were said, by mean gain; demoted: what the base likes best, by how much it lost

The unit that is resampled is a reply: tokens of one reply depend on each other. (The measures are those of Liu et al.
2024, arXiv 2401.08565, section 6, which tells them without intervals.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from proxytune.analysis.classes import label
from proxytune.errors import DataError
from proxytune.evaluation.intervals import LEVEL, SAMPLES, Estimate, Measured, bootstrap

FIGURES = ("changed", "gain", "kl", "base_agrees")
ROLES = ("base", "expert", "anti", "steered")
CONTEXTS, BEFORE, AFTER = 3, 40, 25  # examples of a token, and the characters around it
FLIPS = 10_000  # of the sign-flip test
Record = Mapping[str, Any]


def summarise(
    records: Sequence[Record],
    classes: str,
    *,
    min_uses: int,
    shown: int = 20,
    level: float = LEVEL,
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """min_uses: of a token that is told. shown: so many of the promoted and of the demoted at most.

    Raises DataError where no record has a token.
    """
    records = [record for record in records if record["ids"]]
    if not records:
        raise DataError("there is no token to look at: every reply is empty", "name a run whose replies have text")
    columns = Columns(records, classes)
    kinds = sorted(set(columns.kinds), key=list(columns.kinds).index)
    bands = list(_bands(int(columns.positions.max()) + 1))
    groups: dict[tuple, np.ndarray] = {("overall",): np.ones(len(columns.rows), dtype=bool)}
    groups |= {("band", *band): (columns.positions >= band[0]) & (columns.positions < band[1]) for band in bands}
    groups |= {("kind", kind): columns.kinds == kind for kind in kinds}
    measures = {(*group, name): columns.measured(name, inside) for group, inside in groups.items() for name in FIGURES}
    estimates = bootstrap(measures, samples, seed)

    def told(*group: Any) -> dict[str, Any]:
        return {name: _told(estimates[(*group, name)], level) for name in FIGURES}

    return {
        "replies": len(records),
        "tokens": len(columns.rows),
        "classes": classes,
        "level": level,
        "min_uses": min_uses,
        "overall": told("overall"),
        "by_position": [
            {"from": start + 1, "to": end, "tokens": int(groups["band", start, end].sum()), **told("band", start, end)}
            for start, end in bands
        ],
        "by_class": [
            {"class": kind, "tokens": int(groups["kind", kind].sum()), **told("kind", kind)}
            | {role: float(columns.said[role][groups["kind", kind]].mean()) for role in ROLES}
            for kind in kinds
        ],
        "differences": _differences(columns, kinds, level, samples, seed),
        **_movers(records, columns, min_uses, shown),
    }


class Columns:
    """All tokens of all records beside each other: of each its reply, position and kind, and its numbers."""

    def __init__(self, records: Sequence[Record], classes: str):
        def joined(column: str, of: str | None = None) -> np.ndarray:
            return np.concatenate([np.array(r[column] if of is None else r[column][of]) for r in records])

        def first(column: str, role: str) -> np.ndarray:
            return np.concatenate([np.array([row[0] for row in r[column][role]]) for r in records])

        self.names = [str(number) for number in range(len(records))]
        self.rows = np.concatenate([np.full(len(r["ids"]), number) for number, r in enumerate(records)])
        self.positions = np.concatenate([np.arange(len(r["ids"])) for r in records])
        self.kinds = np.array([kind for record in records for kind in label(classes, record["pieces"])])
        self.ids = joined("ids")
        self.said = {role: np.exp(joined("logprobs", role)) for role in ROLES}  # probabilities of the tokens said
        self.liked = first("top", "base")
        self.lost = np.exp(joined("instead")) - np.exp(first("top_logprobs", "base"))
        self.figures = {
            "changed": (self.liked != first("top", "steered")).astype(float),
            "gain": self.said["steered"] - self.said["base"],
            "kl": joined("kl"),
            "base_agrees": (joined("ranks", "base") == 1).astype(float),
        }

    def measured(self, name: str, inside: np.ndarray) -> Measured:
        """A figure's sum and the number of tokens of each reply, of those tokens that are `inside`."""
        size = len(self.names)
        sums = np.bincount(self.rows[inside], self.figures[name][inside], size)
        return Measured(self.names, sums, np.bincount(self.rows[inside], minlength=size).astype(float))


def _bands(length: int) -> Iterator[tuple[int, int]]:
    """Bands of positions, each as wide as all before it: 0, 1, 2-3, 4-7, ..."""
    start, end = 0, 1
    while start < length:
        yield start, min(end, length)
        start, end = end, 2 * end


def _differences(columns: Columns, kinds: Sequence[str], level: float, samples: int, seed: int) -> list[dict[str, Any]]:
    """Of every pair of kinds: by how much their mean gains differ within a reply, on average over the replies that have
    both; and p under Holm's correction for all of these pairs."""
    found = []
    for of, against in combinations(kinds, 2):
        means = []
        for kind in (of, against):
            measured = columns.measured("gain", columns.kinds == kind)
            with np.errstate(invalid="ignore"):
                means.append(measured.values / measured.weights)
        apart = means[0] - means[1]
        apart = apart[~np.isnan(apart)]
        told: dict[str, Any] = {"value": None, "ci": [None, None], "p": None}
        if len(apart):
            names = [str(place) for place in range(len(apart))]
            drawn = bootstrap({"apart": Measured(names, apart, np.ones(len(apart)))}, samples, seed)["apart"]
            told = {**_told(drawn, level), "p": sign_flip(apart, seed)}
        found.append({"of": of, "against": against, "replies": len(apart), **told})
    return _holm(found)


def sign_flip(apart: np.ndarray, seed: int = 0, flips: int = FLIPS) -> float:
    """Two-sided p that paired differences have no side: how often random signs give a mean as far from 0."""
    random = np.random.default_rng(seed)
    sums = np.abs((random.integers(0, 2, size=(flips, len(apart)), dtype=np.int8) * 2 - 1) @ apart)
    return float((1 + (sums >= abs(apart.sum()) - 1e-12).sum()) / (1 + flips))


def _holm(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`p_holm` beside each p (Holm 1979): the chance that any of these tests says so without cause."""
    tested = sorted((one for one in found if one["p"] is not None), key=lambda one: one["p"])
    highest = 0.0
    for place, one in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - place) * one["p"]))
        one["p_holm"] = highest
    return [{"p_holm": None, **one} for one in found]


def _movers(records: Sequence[Record], columns: Columns, min_uses: int, shown: int) -> dict[str, Any]:
    """promoted and demoted: tokens with at least `min_uses` uses, by mean change of probability, with contexts."""
    gains = columns.figures["gain"]
    found = {}
    for name, ids, change, sign in (("promoted", columns.ids, gains, 1), ("demoted", columns.liked, columns.lost, -1)):
        places: dict[int, list[int]] = defaultdict(list)
        for place, token in enumerate(ids.tolist()):
            places[token].append(place)
        means = {token: float(change[its].mean()) for token, its in places.items() if len(its) >= min_uses}
        ranked = sorted((token for token in means if means[token] * sign > 0), key=lambda token: -sign * means[token])
        found[name] = [
            {
                "token": _text(records, columns, places[token][0], token),
                "id": token,
                "uses": len(places[token]),
                "change": means[token],
                "contexts": _contexts(records, columns, sorted(places[token], key=lambda at: -sign * change[at])),
            }
            for token in ranked[:shown]
        ]
    return found


def _text(records: Sequence[Record], columns: Columns, place: int, token: int) -> str:
    record = records[columns.rows[place]]
    return record["words"].get(str(token)) or record["pieces"][columns.positions[place]]


def _contexts(records: Sequence[Record], columns: Columns, places: Sequence[int]) -> list[list[str]]:
    """What stands before a place, the token said there, and what follows; each from a reply of its own."""
    found: dict[int, list[str]] = {}
    for place in places:
        row, at = int(columns.rows[place]), int(columns.positions[place])
        if row not in found:
            pieces = records[row]["pieces"]
            before, after = "".join(pieces[:at]), "".join(pieces[at + 1 :])
            found[row] = [before[-BEFORE:], pieces[at], after[:AFTER]]
        if len(found) == CONTEXTS:
            break
    return list(found.values())


def _told(estimate: Estimate, level: float) -> dict[str, Any]:
    """A value and its interval; null where there is none."""
    interval = estimate.interval(level)
    low, high = (float(bound) if np.isfinite(bound) else None for bound in (interval.low, interval.high))
    return {"value": float(interval.value) if np.isfinite(interval.value) else None, "ci": [low, high]}
