"""Steering inside `model.generate(...)`, for those who stay with transformers' own loop.

    processor = ProxyTuningLogitsProcessor(mixture, alphas=0.6)
    base.generate(**inputs, logits_processor=[processor])

The engine decodes faster and drafts; this is the method where the base's loop is somebody else's: beam search,
constrained decoding, other processors beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from proxytune.decoding.mixture import Mixture, no_number
from proxytune.errors import ModelError
from proxytune.models.source import Stream, Term


class ProxyTuningLogitsProcessor:
    """Adds sum_i alpha_i * (expert_i - anti_i) to the base's scores at every step of `generate`.

    mixture: as `proxytune.load(...).mixture`. alphas: one number for each of its pairs. prompts: for each role the ids
    of every row's prompt, where a role reads another prompt than the base (a chat template); rows repeated by
    `generate` (beams, several returned sequences) are found by their order. pad_token_id: what a batch is padded with
    on the left; leading ids equal to it are no part of a row.

    The small models keep their own keys and values. Whatever `generate` does with its rows (beams that change places,
    candidates taken back), a row goes on from what was read of its longest known beginning, among the rows of its own
    prompt. Returned are log-probabilities, so that beams are compared by the steered distribution.
    """

    def __init__(
        self,
        mixture: Mixture,
        alphas: Sequence[float] | float = 1.0,
        *,
        pad_token_id: int | None = None,
        prompts: dict[str, Sequence[Sequence[int]]] | None = None,
    ):
        self.mixture, self.pad = mixture, pad_token_id
        self.alphas = [float(alphas)] * len(mixture.pairs) if isinstance(alphas, (int, float)) else list(alphas)
        if len(self.alphas) != len(mixture.pairs):
            raise ModelError(f"{len(self.alphas)} alphas are given for {len(mixture.pairs)} experts", "give one each")
        self.prompts = prompts or {}
        self.groups = [[t for t in group if t != mixture.base] for group in mixture.groups]
        self.groups = [group for group in self.groups if group]
        self.streams: list[Stream] = []
        self.known: list[list[int]] = []
        self.alike: list[list[int]] = []
        self.half = 0

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [self._row(ids) for ids in input_ids.tolist()]
        if len(rows) != len(self.known) or self._begins(rows):
            self._open(rows)
        self._arrange(rows)
        size = self.mixture.vocabulary.size
        found = {self.mixture.base: scores[:, :size]}
        for group, stream in zip(self.groups, self.streams, strict=True):
            for term, scores_BV in zip(group, self._read(group, stream, rows).unbind(1), strict=True):
                found[term] = scores_BV.to(scores.device)
        self.known = rows
        steered = self.mixture.combine(found, self.alphas)
        if bool((broken_B := ~steered.amax(-1).isfinite()).any()):
            row = int(broken_B.nonzero()[0])
            raise no_number(f"output position {len(rows[row]) - len(self.first[row])} of row {row}")
        steered = steered.log_softmax(-1)
        padding = scores.new_full((len(scores), scores.shape[1] - size), -torch.inf)  # rows of the head beyond the ids
        return torch.cat([steered.to(scores.dtype), padding], dim=-1)

    def _row(self, ids: list[int]) -> list[int]:
        first = next((i for i, token in enumerate(ids) if token != self.pad), len(ids) - 1)
        return ids[first:]

    def _begins(self, rows: list[list[int]]) -> bool:
        """Whether this is another call of `generate`: a row does not go on from its prompt."""
        return any(row[: len(first)] != first for row, first in zip(rows, self.first, strict=True))

    def _open(self, rows: list[list[int]]) -> None:
        self.first, self.known, self.half = rows, [[] for _ in rows], 0
        # Only of rows that have one prompt, for every role, is what was read of one known of the other.
        terms = [term for group in self.groups for term in group]
        whole = [(row, *(self._prompt(term, i) for term in terms)) for i, row in enumerate(rows)]
        self.alike = [[i, *(j for j in range(len(rows)) if j != i and whole[j] == whole[i])] for i in range(len(rows))]
        self.streams = [
            group[0].source.open(2 * len(rows), 256, tuple(term.member for term in group)) for group in self.groups
        ]

    def _prompt(self, term: Term, row: int) -> list[int]:
        given = self.prompts.get(term.role)
        if given is None:
            return self.first[row]
        if len(self.first) % len(given):
            raise ModelError(f"{len(given)} prompts are given for {len(self.first)} rows", "give one for each prompt")
        return list(given[row // (len(self.first) // len(given))])

    def _arrange(self, rows: list[list[int]]) -> None:
        """Let every row stand where its longest known beginning was read, by way of the stream's other half."""
        sources = [
            max(alike, key=lambda j: _common(row, self.known[j])) for row, alike in zip(rows, self.alike, strict=True)
        ]
        if sources != list(range(len(rows))):
            count = len(rows)
            for stream in self.streams:
                for i, j in enumerate(sources):
                    stream.copy(self.half * count + j, (1 - self.half) * count + i)
            self.half = 1 - self.half
        self.read = [min(_common(row, self.known[j]), len(row) - 1) for row, j in zip(rows, sources, strict=True)]

    def _read(self, group: Sequence[Term], stream: Stream, rows: list[list[int]]) -> Tensor:
        """Scores (B, M, V) of what follows each row, for each member of a group."""
        first = self.half * len(rows)
        ids, starts = [], []
        for i, row in enumerate(rows):
            whole = [[*self._prompt(term, i), *row[len(self.first[i]) :]] for term in group]
            behind = len(row) - self.read[i]  # a row that was never read has nothing, its prompt included
            begin = [0 if self.read[i] < len(self.first[i]) else len(each) - behind for each in whole]
            ids.append([each[at:] for each, at in zip(whole, begin, strict=True)])
            starts.append(begin)
        longest = max(len(each) for row in ids for each in row)
        if longest > 1:
            padded = [[each[:-1] + [0] * (longest - len(each)) for each in row] for row in ids]
            stream.fill(torch.tensor(padded), torch.tensor(starts), first=first)
        last_BM1 = torch.tensor([[[each[-1]] for each in row] for row in ids])
        ends = [
            [at + len(each) - 1 for at, each in zip(s, row, strict=True)] for s, row in zip(starts, ids, strict=True)
        ]
        return stream.read(last_BM1, torch.tensor(ends), first=first)[:, :, 0]


def _common(row: Sequence[int], known: Sequence[int]) -> int:
    """How many ids two rows have in common from the start."""
    return next((i for i, (a, b) in enumerate(zip(row, known, strict=False)) if a != b), min(len(row), len(known)))
