"""One round of the loop: tokens are drafted, every model reads them, and each position's token is chosen.

Exact by construction. The token at each position is the choice from the steered scores that follow the tokens before
it; a drafted token only lets that position be read earlier. It is kept when it equals the choice, and the first that
does not is replaced by the choice, so the draft decides how much is said in a round and never what is said.

Shapes: R rows, M members of a source, Q positions read, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from proxytune.decoding.mixture import Term
from proxytune.decoding.request import TokenLogprobs

if TYPE_CHECKING:
    from proxytune.decoding.drafting import Clock
    from proxytune.decoding.engine import Rows


class Round:
    """The rows' next positions: position 0 follows each row's last token, position j follows j drafted ones."""

    def __init__(self, rows: Rows, clock: Clock):
        self.rows, self.clock = rows, clock
        self.mixture = rows.mixture
        self.drafted_RK = torch.empty(len(rows.each), 0, dtype=torch.int64, device=rows.device)
        self.scores: dict[Term, Tensor] = {}
        self.broken: dict[int, int] = {}  # rows with no choice at a position

    def extend(self, terms: Sequence[Term], positions: int) -> None:
        """Read until every one of these terms has scores at `positions` positions.

        A GPU works on while the next forward is begun: those come first, and scores are fetched when all are begun.
        """
        found: dict[Term, Tensor] = {}
        for number, group in sorted(enumerate(self.mixture.groups), key=lambda g: g[1][0].source.device.type == "cpu"):
            short = [term for term in group if term in terms and self._have(term) < positions]
            together = len(short) == len(group) and len({self._have(term) for term in group}) == 1
            for part in [short] if together else [[term] for term in short]:
                if part:
                    found |= zip(part, self._read(number, group, part, positions), strict=True)
        for term, scores_RQV in found.items():
            new_RQV = scores_RQV.to(self.rows.device)
            self.scores[term] = torch.cat([self.scores[term], new_RQV], dim=1) if self._have(term) else new_RQV

    def _have(self, term: Term) -> int:
        return self.scores[term].shape[1] if term in self.scores else 0

    def _read(self, number: int, group: Sequence[Term], part: Sequence[Term], positions: int) -> tuple[Tensor, ...]:
        """The scores of `part`, all of a group or one of it, from those it has up to `positions`."""
        have, member = self._have(part[0]), None if len(part) == len(group) else group.index(part[0])
        starts_RM, pending_RM = self.rows.starts[number] + have, self.rows.pending[number]
        if member is not None:
            starts_RM, pending_RM = starts_RM[:, member, None], pending_RM[:, member, None]
        ids_RMQ = self.drafted_RK[:, None, max(have - 1, 0) : positions - 1].expand(-1, len(part), -1)
        if have == 0:
            ids_RMQ = torch.cat([pending_RM[:, :, None], ids_RMQ], dim=2)
        with self.clock.reading(part, len(starts_RM), positions - have):
            return self.rows.streams[number].read(ids_RMQ, starts_RM, member=member).unbind(1)

    def draft(self, tokens_RK: Tensor) -> None:
        self.drafted_RK = torch.cat([self.drafted_RK, tokens_RK], dim=1)

    def choose(self, scores_RQV: Tensor, first: int) -> Tensor:
        """The tokens (R, Q) that each row's rules choose from steered scores at positions `first` + 0..Q-1."""
        rows, width = self.rows, scores_RQV.shape[1]
        positions_RQ = rows.counts_R1 + torch.arange(first, first + width, device=rows.device)
        scores_RQV = rows.forbid(scores_RQV, first)
        return rows.choice(scores_RQV, positions_RQ, self._seen(first, width))

    def _seen(self, first: int, width: int) -> Tensor | None:
        """Which ids each position has before it, (R, Q, V): each its own drafted prefix too."""
        if self.rows.seen_RV is None:
            return None
        seen = [self.rows.seen_RV.scatter(1, self.drafted_RK[:, :first], True)]
        for position in range(first, first + width - 1):
            seen.append(seen[-1].scatter(1, self.drafted_RK[:, position : position + 1], True))
        return torch.stack(seen, dim=1)

    def steered(self, first: int, stop: int) -> Tensor:
        """Steered scores (R, Q, V) at positions first..stop-1."""
        scores = {term: scores_RQV[:, first:stop] for term, scores_RQV in self.scores.items()}
        alphas = [alpha_R1[:, :, None] for alpha_R1 in self.rows.alphas]
        base_RQV, variants = scores[self.mixture.base], self.rows.variants
        if not variants.off:
            share_RQ1 = variants.share(
                base_RQV, self.rows.counts_R1 + torch.arange(first, stop, device=base_RQV.device)
            )
            alphas = [alpha_R11 * share_RQ1 for alpha_R11 in alphas]
        combined_RQV = self.mixture.combine(scores, alphas)
        if not variants.off:
            allowed_RQV = self.rows.forbid(self.mixture.vocabulary.mask(base_RQV), first)
            combined_RQV = variants.filter(allowed_RQV, combined_RQV)
        return combined_RQV

    def target(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """The chosen tokens (R, Q) at positions first..stop-1, and whether any model gave NaN or infinity there."""
        combined_RQV = self.steered(first, stop)
        tokens_RQ = self.choose(combined_RQV, first)
        # arg-max takes a NaN or an infinity where there is one, so the chosen score tells; -inf may be a rule's doing
        chosen_RQ = combined_RQV.gather(-1, tokens_RQ[..., None])[..., 0]
        broken_RQ = chosen_RQ.isnan() | chosen_RQ.isposinf()
        if chosen_RQ.isneginf().any():
            broken_RQ |= combined_RQV.amax(-1).isneginf()
        return tokens_RQ, broken_RQ

    def run(self, drafter, count: int) -> tuple[list[list[int]], list[int]]:
        """Draft `count` tokens, verify them; for each row the tokens that are now said, and how many were drafted."""
        terms, readers = self.mixture.terms, drafter.terms if count else ()
        if count:
            drafter.propose(self, count)
        self.extend([term for term in terms if term not in readers], count + 1)
        self.extend(readers, count)
        width = count if readers else count + 1
        chosen_RQ, broken_RQ = self.target(0, width)
        kept_R = (chosen_RQ[:, :count] == self.drafted_RK).long().cumprod(1).sum(1)
        if width == count and bool((kept_R == count).any()):  # all held: the drafting models read the last one too
            self.extend(readers, count + 1)
            last_R1, broken_R1 = self.target(count, count + 1)
            chosen_RQ, broken_RQ = torch.cat([chosen_RQ, last_R1], 1), torch.cat([broken_RQ, broken_R1], 1)
        kept = kept_R.tolist()
        said = [row[: held + 1] for row, held in zip(chosen_RQ.tolist(), kept, strict=True)]
        for row, broken in enumerate(broken_RQ.tolist()):
            if any(broken[: len(said[row])]):
                self.broken[row] = broken.index(True)
                del said[row][self.broken[row] :]
        return said, kept

    def logprobs(self, said: Sequence[Sequence[int]]) -> dict[int, list[TokenLogprobs]]:
        """What the rows that ask for log-probabilities are told of the tokens said, by row; nothing said is changed."""
        asking = {i: row.request.logprobs for i, row in enumerate(self.rows.each) if row.request.logprobs and said[i]}
        if not asking:
            return {}
        stop = max(len(tokens) for tokens in said)
        steered_RQV = self.steered(0, stop)
        alone = {term: self.scores[term][:, :stop] for term in self.mixture.terms}
        base_RQ = self.choose(self.mixture.vocabulary.mask(alone[self.mixture.base]), 0)
        found = {}
        for i, count in asking.items():
            here = slice(0, len(said[i]))
            likeliest_QK = steered_RQV[i, here].topk(min(count, steered_RQV.shape[-1])).indices
            said_Q = torch.tensor(said[i], device=likeliest_QK.device)
            ids_QK = torch.cat([said_Q[:, None], base_RQ[i, here, None], likeliest_QK], dim=1)
            steered = _logprobs(steered_RQV[i, here], ids_QK)
            by_role = {term.role: _logprobs(scores_RQV[i, here], ids_QK) for term, scores_RQV in alone.items()}
            found[i] = [
                TokenLogprobs(tuple(ids), steered[q], {role: each[q] for role, each in by_role.items()})
                for q, ids in enumerate(ids_QK.tolist())
            ]
        return found


def _logprobs(scores_QV: Tensor, ids_QK: Tensor) -> list[tuple[float, ...]]:
    """Log-probabilities of ids; in float32 at least."""
    scores_QV = scores_QV.float() if scores_QV.dtype.itemsize < 4 else scores_QV
    return [tuple(row) for row in scores_QV.log_softmax(-1).gather(-1, ids_QK).tolist()]
