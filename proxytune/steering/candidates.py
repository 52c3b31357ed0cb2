"""The steering equation on a partial list of base scores, with a certificate that the list was enough.

A base behind an API gives the log-probabilities of a few tokens: its k best, and perhaps some that were asked for by
id. Expert and anti are known in full, and so is the noise of the choice. What is not known of a token v that was not
returned is bounded: with s_k the k-th best score and P the probability of everything returned,

    base(v) <= cap = min(s_k, log(1 - P)),  so  steered(v) <= cap + sum_e alpha_e * (expert_e(v) - anti_e(v))

for alphas of either sign, since the differences are known exactly. So each steered score lies in an interval: a point
where the base's score is known, (-inf, bound] where it is not. A server's rounding widens both by `tolerance`.
Temperature, noise and every truncation act on intervals: one that certainly drops a token takes its upper end to -inf,
one that does not certainly keep it takes its lower end there. The arg-max is certified when the lower end of the best
known token lies above the upper ends of all others; otherwise the tokens in the way are named, to be asked for.

    top-k   the K-th largest score lies between the K-th largest lower end and the K-th largest upper end
    min-p   likewise for the largest score
    top-p   v is kept if A / Z < p, with A the mass above v and Z all mass, both bounded from both sides

At most n = ceil((1 - P) / e^cap) unknown tokens can be at the cap at once, so at temperatures up to 1 (where mass is
convex in the base's probability) the n largest bounds hold the mass of all of them. A penalty that depends on the sign
of raw scores cannot be had from log-probabilities at all.

Rounding in the sums is monotone, so with tolerance 0 the certificate is exact in floating point as well.

Shapes: B rows, K returned tokens, V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from proxytune.steering.arithmetic import steer

_SUM_ERROR = 1e-6  # of the returned probabilities' sum, from float32 scores
_SHARE_ERROR = 1e-4  # of a cumulative share of mass in float32, as top-p takes it


@dataclass(frozen=True)
class Bounds:
    """Intervals that hold the scores: lower = -inf where nothing is known. most_B: see n above (V where no use)."""

    lower_BV: Tensor
    upper_BV: Tensor
    known_BV: Tensor
    most_B: Tensor


@dataclass(frozen=True)
class Decision:
    """The best known tokens (B,), whether each is certainly the choice over all V, and what stands in its way.

    rivals_BV: the unknown tokens to ask for, those most in the way highest; -inf elsewhere.
    """

    tokens_B: Tensor
    certified_B: Tensor
    rivals_BV: Tensor


def bound(
    ids_BK: Tensor,
    scores_BK: Tensor,
    floors_B: Tensor,
    vocabulary: int,
    *,
    tolerance: float = 0.0,
    unbounded: Sequence[int] = (),
) -> Bounds:
    """The base's intervals from log-probabilities of some tokens; every id not among them scores floors_B at most.

    Ids outside 0..V-1 count as mass only (padding: id -1, score -inf). unbounded: ids that the server may have left out
    whatever they score, because it cannot name them. tolerance: the most that a score may be off, either way.
    """
    inside_BK = (ids_BK >= 0) & (ids_BK < vocabulary) & (scores_BK > -torch.inf)
    mass_BK = (scores_BK.double() - tolerance).exp()
    rest_B1 = (1 + _SUM_ERROR - mass_BK.sum(-1, keepdim=True)).clamp(min=_SUM_ERROR)
    cap_B1 = torch.minimum(floors_B[:, None].double() + tolerance, rest_B1.log()).clamp(max=0)
    upper_BV = cap_B1.to(scores_BK.dtype).repeat(1, vocabulary)
    upper_BV = torch.nextafter(upper_BV, torch.full_like(upper_BV, torch.inf)) if tolerance else upper_BV
    most_B = (rest_B1 / cap_B1.exp()).ceil().clamp(1, vocabulary).long()[:, 0]
    if unbounded:
        left_B1 = (1 + _SUM_ERROR - (mass_BK * inside_BK).sum(-1, keepdim=True)).clamp(min=_SUM_ERROR)
        upper_BV[:, list(unbounded)] = left_B1.log().clamp(max=0).to(upper_BV.dtype)
        most_B = torch.full_like(most_B, vocabulary)
    place_BK = ids_BK.where(inside_BK, vocabulary)  # one column more, for what is outside
    lower_BV = upper_BV.new_full((len(ids_BK), vocabulary + 1), -torch.inf)
    lower_BV = lower_BV.scatter(-1, place_BK, scores_BK - tolerance)[:, :-1]
    known_BV = lower_BV.new_zeros(len(ids_BK), vocabulary + 1, dtype=torch.bool)
    known_BV = known_BV.scatter(-1, place_BK, True)[:, :-1]
    upper_BV = torch.where(known_BV, lower_BV + 2 * tolerance, upper_BV)
    return Bounds(torch.where(known_BV, lower_BV, -torch.inf), upper_BV, known_BV, most_B)


def steer_bounds(base: Bounds, differences: Sequence[tuple[Tensor, float | Tensor]]) -> Bounds:
    """The equation on both ends; `differences` as in `arithmetic.steer`."""
    lower_BV = steer(base.lower_BV, differences)
    known_BV = base.known_BV.to(lower_BV.device)
    return Bounds(
        torch.where(known_BV, lower_BV, -torch.inf),
        steer(base.upper_BV, differences),
        known_BV,
        base.most_B.to(lower_BV.device),
    )


def forbid(bounds: Bounds, ids: Sequence[int]) -> Bounds:
    """These ids are never said."""
    if not ids:
        return bounds
    lower_BV, upper_BV = bounds.lower_BV.clone(), bounds.upper_BV.clone()
    lower_BV[:, list(ids)] = upper_BV[:, list(ids)] = -torch.inf
    return replace(bounds, lower_BV=lower_BV, upper_BV=upper_BV)


def narrow(steered: Bounds, temperature: float, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Bounds:
    """The intervals after temperature (> 0), top-k, top-p and min-p, in this order, each as `choice.warp` has it."""
    like = steered.upper_BV
    divisor = torch.as_tensor(temperature, dtype=like.dtype, device=like.device)  # divided as the choice does it
    bounds = replace(steered, lower_BV=steered.lower_BV / divisor, upper_BV=like / divisor)
    if 0 < top_k < bounds.upper_BV.shape[-1]:
        lowest_B1 = bounds.lower_BV.topk(top_k, dim=-1).values[:, -1:]
        highest_B1 = bounds.upper_BV.topk(top_k, dim=-1).values[:, -1:]
        bounds = _truncate(bounds, bounds.upper_BV < lowest_B1, bounds.lower_BV >= highest_B1)
    if top_p < 1:
        bounds = _truncate(bounds, *_nucleus(bounds, top_p, convex=temperature <= 1))
    if min_p > 0:
        margin = torch.as_tensor(min_p, dtype=like.dtype, device=like.device).log()
        lowest_B1 = bounds.lower_BV.amax(-1, keepdim=True) + margin
        highest_B1 = bounds.upper_BV.amax(-1, keepdim=True) + margin
        bounds = _truncate(bounds, bounds.upper_BV < lowest_B1, bounds.lower_BV >= highest_B1)
    return bounds


def decide(bounds: Bounds, noise_BV: Tensor | None = None, whole: Bounds | None = None) -> Decision:
    """The best known token of each row under the noise (None is greedy), and whether no other can be better.

    whole: the intervals before `narrow`, which tell whose mass may decide what a truncation keeps.
    """
    noise = 0.0 if noise_BV is None else noise_BV
    lower_BV, upper_BV = bounds.lower_BV + noise, bounds.upper_BV + noise
    known_BV = torch.where(bounds.known_BV, upper_BV, -torch.inf)
    nothing_B1 = known_BV.amax(-1, keepdim=True) == -torch.inf
    tokens_B1 = torch.where(nothing_B1, upper_BV, known_BV).argmax(-1, keepdim=True)
    won_B1 = lower_BV.gather(-1, tokens_B1)
    others_BV = upper_BV.scatter(-1, tokens_B1, -torch.inf)
    certified_B = (won_B1 > others_BV.amax(-1, keepdim=True))[:, 0]
    in_way_BV = (upper_BV >= won_B1) & ~certified_B[:, None]
    # Where it is open what a truncation keeps, the unknown tokens' masses are in the way, whatever their noise.
    unsure_B1 = (in_way_BV & bounds.known_BV & (bounds.lower_BV == -torch.inf)).any(-1, keepdim=True)
    masses_BV = bounds.upper_BV if whole is None else whole.upper_BV
    rank_BV = torch.where(unsure_B1, masses_BV, torch.where(in_way_BV, upper_BV, -torch.inf))
    return Decision(tokens_B1[:, 0], certified_B, rank_BV.masked_fill(bounds.known_BV, -torch.inf))


def _truncate(bounds: Bounds, dropped_BV: Tensor, kept_BV: Tensor) -> Bounds:
    """Intervals where some tokens are certainly dropped and some certainly kept."""
    return replace(
        bounds,
        lower_BV=bounds.lower_BV.masked_fill(~kept_BV, -torch.inf),
        upper_BV=bounds.upper_BV.masked_fill(dropped_BV, -torch.inf),
    )


def _nucleus(bounds: Bounds, top_p: float, convex: bool) -> tuple[Tensor, Tensor]:
    """Which tokens top-p certainly drops, and which it certainly keeps. Sorts the known tokens only."""
    size, count = bounds.upper_BV.shape[-1], max(1, int(bounds.known_BV.sum(-1).max()))
    peak_B1 = bounds.upper_BV.amax(-1, keepdim=True).double()
    high_BV = (bounds.upper_BV.double() - peak_B1).exp()
    best = bounds.lower_BV.topk(count, dim=-1)
    low_BK = (best.values.double() - peak_B1).exp().flip(-1)  # rising
    # Mass that is certainly above each token, against all that there may be
    beyond_BK = _with_zero(low_BK.flip(-1).cumsum(-1).flip(-1))
    sure_BV = beyond_BK.gather(-1, torch.searchsorted(low_BK, high_BV, right=True))
    unknown_BV = high_BV.masked_fill(bounds.known_BV, 0)
    most = int(bounds.most_B.max()) if convex else size
    if most < size:
        unknown_BM = unknown_BV.topk(most, dim=-1).values.cumsum(-1)
        unknown_B1 = unknown_BM.gather(-1, bounds.most_B[:, None] - 1)
    else:
        unknown_B1 = unknown_BV.sum(-1, keepdim=True)
    total_B1 = (high_BV - unknown_BV).sum(-1, keepdim=True) + unknown_B1
    # Mass that may be above each known token, its own aside, against what there is at least
    bucket_BV = torch.searchsorted(low_BK, high_BV)
    masses_BK = high_BV.new_zeros(len(high_BV), count + 1).scatter_add(-1, bucket_BV, high_BV)
    above_BK = masses_BK.flip(-1).cumsum(-1).flip(-1)[:, 1:]
    own_BK = high_BV.gather(-1, best.indices.flip(-1))
    above_BK = above_BK - torch.where(own_BK > low_BK, own_BK, 0)
    kept_BK = (low_BK > 0) & (above_BK < (top_p - _SHARE_ERROR) * low_BK.sum(-1, keepdim=True))
    kept_BV = torch.zeros_like(bounds.known_BV).scatter(-1, best.indices.flip(-1), kept_BK)
    return sure_BV >= (top_p + _SHARE_ERROR) * total_B1, kept_BV


def _with_zero(sums_BK: Tensor) -> Tensor:
    return torch.cat([sums_BK, torch.zeros_like(sums_BK[:, :1])], dim=-1)
