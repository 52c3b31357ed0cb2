"""How far each alpha moves the base on the first held-out rows: measured once, kept by content as points are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxytune.experts.registry import Expert
from proxytune.files import hash_json, read_checked, write_checked
from proxytune.settings import Evaluate
from proxytune.stages.shared import trio as trios
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
    missing = [alpha for alpha, path in paths.items() if not path.is_file()]
    for alpha, found in (_computed(settings, expert, beside, missing, held) if missing else {}).items():
        write_checked(paths[alpha], found)
    return {alpha: its for alpha, path in paths.items() if (its := read_checked(path))}


def _computed(
    settings: Evaluate, expert: Expert, beside: trios.Held, alphas: Sequence[float], rows: Sequence[Row]
) -> Mapping[float, list[dict[str, Any]]]:
    """All alphas from one pass of each model."""
    from proxytune.analysis.divergence import divergences

    trio = trios.load(settings, expert, beside)
    mixture = trios.mixtures(trio)["steered"]
    told = trios.given(trio, mixture, rows)
    given = [one for _, one in told]
    asked = [trios.alphas(mixture, alpha, beside) for alpha in alphas]
    size = settings.score_batch_size
    batches = divergences(mixture, given, asked, batch_size=size)
    found = [its for batch in track(batches, "divergence", -(-len(given) // size)) for its in batch]
    return {
        alpha: [
            {"id": row["id"], "kl_base": its[a][0], "kl_expert": its[a][1], "tokens": len(one.completion)}
            for (row, one), its in zip(told, found, strict=True)
        ]
        for a, alpha in enumerate(alphas)
    }
