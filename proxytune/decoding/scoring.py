"""The loss of given replies under a mixture, for many alphas in one pass of each model.

At each scored position the base's scores and the differences are kept while every alpha is tried on them, so any number
of alphas costs one forward of each model. The normaliser needs the whole vocabulary: nothing is cut to a top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from proxytune.decoding.mixture import Mixture, Prompts, Term, no_number
from proxytune.errors import DataError
from proxytune.steering.arithmetic import steer


@dataclass(frozen=True)
class Given:
    """A prompt and the reply whose loss is asked: `completion` holds the same ids for every model."""

    prompts: Prompts
    completion: Sequence[int]


def fits(mixture: Mixture, prompts: Prompts, completion: Sequence[int]) -> bool:
    """Whether every model's context holds its prompt and the reply but its last id, which is never read."""
    longest = mixture.longest
    return longest is None or max(len(prompts[t.role]) for t in mixture.terms) + len(completion) - 1 <= longest


def _refuse_unfit(mixture: Mixture, prompts: Prompts, completion: Sequence[int]) -> None:
    if not completion or not all(prompts[term.role] for term in mixture.terms):
        raise DataError("a prompt or its reply has no tokens", "give each at least one")
    mixture.check(prompts)
    if not fits(mixture, prompts, completion):
        size = max(len(prompts[term.role]) for term in mixture.terms) + len(completion)
        what = f"a prompt and its reply have {size} tokens and the models read {mixture.longest}"
        raise DataError(what, "leave such rows out")


@torch.inference_mode()
def losses(
    mixture: Mixture, rows: Sequence[Given], alphas: Sequence[Sequence[float]], *, batch_size: int = 32
) -> Iterator[list[list[float]]]:
    """Yield, batch by batch, for each row its summed negative log-likelihood in nats under every alpha.

    alphas: one entry for each mixture of alphas, itself one number for each pair. Rows are scored in order.
    """
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        scores = scored(mixture, batch)
        yield [_row(mixture, each, row.completion, alphas) for row, each in zip(batch, scores, strict=True)]


def scored(mixture: Mixture, rows: Sequence[Given]) -> list[dict[Term, Tensor]]:
    """The terms' scores (T, V) of each row, at every position of its reply; one forward a source.

    Raises DataError for a row that is longer than a model's context, or has nothing to read or to score.
    """
    for row in rows:
        _refuse_unfit(mixture, row.prompts, row.completion)
    scores: dict[Term, list[Tensor]] = {}
    device = mixture.base.source.device
    for group in mixture.groups:
        prompts = [[row.prompts[term.role] for term in group] for row in rows]
        members = [term.member for term in group]
        found = group[0].source.score(prompts, [row.completion for row in rows], members)
        scores |= {term: [each[m].to(device) for each in found] for m, term in enumerate(group)}
    return [{term: each[i] for term, each in scores.items()} for i in range(len(rows))]


@torch.inference_mode()
def choices(
    mixture: Mixture, prompts: Prompts, completions: Sequence[Sequence[int]], alphas: Sequence[Sequence[float]]
) -> list[list[float]]:
    """What `losses` gives for several replies to one prompt, which every model reads once."""
    _refuse_unfit(mixture, prompts, max(completions, key=len))
    rows, width = len(completions), max(map(len, completions))
    device = mixture.base.source.device
    scores: dict[Term, Tensor] = {}
    for group in mixture.groups:
        asked = [list(prompts[term.role]) for term in group]
        longest = max(map(len, asked))
        stream = group[0].source.open(rows, longest + width, tuple(term.member for term in group))
        if longest > 1:
            before = [ids[:-1] + [0] * (longest - len(ids)) for ids in asked]
            stream.fill(torch.tensor([before]), torch.zeros(1, len(group), dtype=torch.int64))
        for row in range(1, rows):
            stream.copy(0, row)
        ids_NMQ = torch.tensor(
            [[[own[-1], *reply[:-1], *[0] * (width - len(reply))] for own in asked] for reply in map(list, completions)]
        )
        starts_NM = torch.tensor([[len(own) - 1 for own in asked]] * rows)
        read_NMQV = stream.read(ids_NMQ, starts_NM).to(device)
        scores |= {term: read_NMQV[:, m] for m, term in enumerate(group)}
    return [
        _row(mixture, {term: each[i, : len(reply)] for term, each in scores.items()}, reply, alphas)
        for i, reply in enumerate(completions)
    ]


def check(numbers_T: Tensor) -> None:
    """ModelError where a position's number is none: its loss, or its largest score."""
    broken_T = ~numbers_T.isfinite()
    if bool(broken_T.any()):
        raise no_number(f"position {int(broken_T.nonzero()[0])} of a reply of {len(numbers_T)} tokens")


def _row(mixture: Mixture, scores: Mapping[Term, Tensor], completion: Sequence[int], alphas) -> list[float]:
    base_TV = scores[mixture.base]
    differences = mixture.differences(scores)
    wanted_T = torch.tensor(list(completion), device=base_TV.device)
    found = []
    for entry in alphas:
        steered_TV = mixture.vocabulary.mask(steer(base_TV, list(zip(differences, entry, strict=True))))
        nats_T = torch.logsumexp(steered_TV, -1) - steered_TV.gather(-1, wanted_T[:, None])[:, 0]
        check(nats_T)
        found.append(float(nats_T.double().sum()))
    return found
