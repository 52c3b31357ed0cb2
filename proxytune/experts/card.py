"""The model card of a registered expert, made from its manifest and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proxytune.experts.manifest import FILENAME, Manifest
from proxytune.experts.registry import Expert

PAPER = "https://arxiv.org/abs/2401.08565"
_LIMITS = """\
## Limits

- An expert steers; it is not meant to answer alone. Steered scores are `base + alpha * ({name} - anti)`.
- It fits one anti only, the checkpoint named above, known by its hashes, and `proxytune` refuses any other; the base
  must mean the same by every token id.
- Alpha and the numbers given here hold for the base, the rows and the way of prompting they were measured with.
- What it was tuned on limits what it can bring out of a base; rows were not checked for bias or for personal data."""


def card(expert: Expert, repo: str) -> str:
    """The README.md of `repo` on the hub: YAML for the hub, Markdown for people."""
    known = expert.manifest
    blocks = [
        f"---\n{_metadata(known)}\n---",
        f"# {expert.reference}",
        _about(known),
        _use(repo, expert),
        _section("Lineage", _lineage(known)),
        _section("Recipe", _recipe(known)),
        *_results(known),
        _LIMITS.format(name="expert"),
        f"Every file's hash, the whole configuration and all scores: `{FILENAME}`.",
    ]
    return "\n\n".join(blocks) + "\n"


def _metadata(known: Manifest) -> str:
    from huggingface_hub import ModelCardData

    return ModelCardData(
        base_model=known.anti.model if _on_the_hub(known.anti.model) else None,
        library_name="peft" if known.kind == "lora" else "transformers",
        pipeline_tag="text-generation",
        tags=["proxy-tuning", "proxytune", known.task, known.family, known.role, known.kind],
    ).to_yaml()


def _on_the_hub(model: str) -> bool:
    return model.count("/") == 1 and not Path(model).expanduser().exists() and model[0] not in "./~"


def _about(known: Manifest) -> str:
    kind = "A LoRA adapter" if known.kind == "lora" else "A whole model"
    if known.role == "tuned":
        return f"{kind}: a base tuned directly on `{known.task}`, as the ceiling that steered bases are compared with."
    return (
        f"{kind}, tuned on `{known.task}`, that steers a larger model while it decodes "
        f"([proxy-tuning]({PAPER})): the difference between this expert and the checkpoint that it was tuned from "
        "(its anti) is added to the larger model's next-token scores."
    )


def _use(repo: str, expert: Expert) -> str:
    known = expert.manifest
    alpha = "" if known.alpha is None else f" alpha={known.alpha:g}"
    lines = [f"proxytune registry pull hub={repo} revision=<commit>"]
    if known.role == "expert":
        lines.append(f"proxytune decode task={known.task} family={known.family} expert={known.name}{alpha} prompt=...")
    return "\n".join(f"    {line}" for line in lines)


def _lineage(known: Manifest) -> Iterator[tuple[str, str]]:
    yield "anti", f"`{known.anti.model}`" + (f" at revision `{known.anti.revision}`" if known.anti.revision else "")
    yield "its weights", f"sha256 `{known.anti.weights}`"
    yield "its tokenizer", f"sha256 `{known.anti.tokenizer}`"
    data = known.data
    yield "rows", f"{data.source}: {data.train:,} train, {data.validation:,} validation, {data.test:,} test"
    yield "their fingerprint", f"`{data.fingerprint}`"
    for before in known.lineage:
        yield (
            "went on from",
            f"{before.reference}: {before.method} on {before.data.train:,} rows of {before.data.source}",
        )
    for came in known.origins:
        yield "taken from", f"{came.reference} of {came.source}" + (f" at `{came.revision}`" if came.revision else "")


def _recipe(known: Manifest) -> Iterator[tuple[str, str]]:
    yield "prompts", f"{known.prompt_format} form"
    for section in ("method", "peft"):
        fields = known.config.get(section)
        if isinstance(fields, Mapping):
            given = [f"{key}={value}" for key, value in fields.items() if value is not None and key != "name"]
            yield section, " ".join([str(fields.get("name", "")), *given])
    yield "seed", str(known.config.get("seed", 0))
    told = [f"{key} {_number(value)}" for key, value in known.training.items() if isinstance(value, int | float)]
    yield "training", ", ".join(told)
    yield "code", f"proxytune {known.code.version}" + (f", commit `{known.code.commit}`" if known.code.commit else "")
    yield "command", f"`{known.command}`"


def _results(known: Manifest) -> Iterator[str]:
    """The tables and the alpha curve that measurements left in the manifest."""
    for split, scores in known.scores.items():
        if isinstance(scores, Mapping) and isinstance(scores.get("table"), list) and scores["table"]:
            metric = scores["table"][0].get("metric_name") or "metric"
            head = ("system", "alpha", "rows", "loss, nats a token", metric)
            rows = [
                (
                    row["system"],
                    _number(row["alpha"]),
                    f"{row['n']:,}",
                    _measured(row, "loss"),
                    _measured(row, "metric"),
                )
                for row in scores["table"]
            ]
            title = (
                f"## Measured on {split} rows, with `{scores.get('base')}` as the base\n\n95% intervals in brackets."
            )
            yield title + "\n\n" + _table(head, rows)
    chosen = known.scores.get("selection")
    if isinstance(chosen, Mapping) and isinstance(chosen.get("curve"), list):
        yield "## Alpha\n\n" + _chosen(known, chosen) + "\n\n" + _table(("alpha", "loss", "metric"), chosen["curve"])


def _chosen(known: Manifest, chosen: Mapping[str, Any]) -> str:
    best = f"{_number(known.alpha)} was best by {chosen.get('by')}, on {chosen.get('n')} validation rows"
    return f"{best}, with `{chosen.get('base')}` as the base."


def _measured(row: Mapping[str, Any], measure: str) -> str:
    interval = row.get(f"{measure}_ci")
    return _number(row[measure]) + (f" [{', '.join(map(_number, interval))}]" if interval else "")


def _section(title: str, lines: Iterator[tuple[str, str]]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {label}: {value}" for label, value in lines)


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    told = [[cell if isinstance(cell, str) else _number(cell) for cell in row] for row in rows]
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in told)]
    return "\n".join(f"| {line} |" for line in lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
