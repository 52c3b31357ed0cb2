"""How far each alpha moves the base on the first held-out rows: measured once, kept by content as points are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxytune.decoding.scoring import Given
from proxytune.evaluation import batches
from proxytune.experts.registry import Expert
from proxytune.files import Journal, finish, hash_json, part_of, read_finished
from proxytune.settings import Evaluate
from proxytune.stages.shared import trio as trios
from proxytune.stages.shared.room import in_smaller_batches
from proxytune.stages.shared.start import dataset
from proxytune.tasks.task import Row
from proxytune.tracking.progress import track

ROWS = 100  # the first ones, where a multirun of `evaluate` is collected


def measured(settings: Evaluate, expert: Expert, alphas: Sequence[float], rows: int) -> dict[float, list[dict]]:
    """By alpha, rows of id, kl_base, kl_expert (analysis/divergence.py) and tokens.

    Rows that are longer than a model's context are left out. {} for no rows, and where the base is behind an API, which
    gives no scores for the whole vocabulary.
    """
    from proxytune.analysis.divergence import VERSION

    if not rows or settings.base is not None:
        return {}
    held = dataset(settings).held(settings.split)[:rows]
    beside = trios.held(settings)
    content = [VERSION, hash_json(held), trios.identity(settings, expert, beside), settings.family.dtype]
    names = {alpha: f"divergence-{settings.task.name}-{hash_json([*content, alpha])[:24]}.jsonl" for alpha in alphas}
    paths = {alpha: settings.outputs / "analysis" / name for alpha, name in names.items()}
    found = {alpha: read_finished(path) for alpha, path in paths.items()}
    if missing := [alpha for alpha, its in found.items() if its is None]:
        for alpha, its in _computed(settings, expert, beside, {alpha: paths[alpha] for alpha in missing}, held).items():
            finish(paths[alpha], its)
            found[alpha] = its
    return {alpha: its for alpha, its in found.items() if its}


def _computed(
    settings: Evaluate, expert: Expert, beside: trios.Held, paths: Mapping[float, Path], rows: Sequence[Row]
) -> Mapping[float, list[dict[str, Any]]]:
    """All alphas, by the paths of their files, from one pass of each model. What is done is kept beside these."""
    from proxytune.analysis.divergence import divergences

    trio = trios.load(settings, expert, beside)
    mixture = trios.mixtures(trio)["steered"]
    told = trios.given(trio, mixture, rows)
    given = [one for _, one in told]
    asked = [trios.alphas(mixture, alpha, beside) for alpha in paths]

    def apart(some: Sequence[Given]) -> list[list[tuple[float, float]]]:
        (found,) = divergences(mixture, some, asked, batch_size=len(some))
        return found

    def at_most(size: int) -> list[Sequence[tuple[float, float]]]:
        journals = [Journal(part_of(path)) for path in paths.values()]
        return list(track(batches.scored(apart, given, size, journals), "divergence", len(given)))

    found = in_smaller_batches(at_most, settings.score_batch_size)
    return {
        alpha: [
            {"id": row["id"], "kl_base": its[a][0], "kl_expert": its[a][1], "tokens": len(one.completion)}
            for (row, one), its in zip(told, found, strict=True)
        ]
        for a, alpha in enumerate(paths)
    }
