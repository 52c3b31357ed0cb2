"""Make a small sibling of a base: read text, choose layers, cut, heal, measure, publish with the recipe."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from proxytune.analysis.tables import console, tight
from proxytune.errors import DataError, SettingsError, StorageError
from proxytune.experts import twin as twins
from proxytune.experts.manifest import seal
from proxytune.files import hash_file, hash_json, locked, read_json, remove_folder, replace_folder, told, write_json
from proxytune.models.identity import identify
from proxytune.models.loading import load_model, load_tokenizer
from proxytune.models.quiet import quiet
from proxytune.settings import ModelRef, Twin
from proxytune.tasks.rowfiles import parsed
from proxytune.tasks.rows import check_whole
from proxytune.tracking import record
from proxytune.tracking.plain import safe_name

RECIPE = "twin.json"
TEXT_KEYS = ("text", "question", "prompt")
CURVE_POINTS = 50
# The settings that a twin follows from, beside its base and the text.
WAYS = {"layers", "window", "held_out", "calibration_windows", "evaluation_windows", "heal", "seed"}


@dataclass(frozen=True)
class Made:
    """A published twin: a plain model folder, and what its twin.json says."""

    folder: Path
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Text:
    """Paragraphs to heal on, paragraphs held out, and what the recipe says of each file."""

    training: list[str]
    held_out: list[str]
    files: list[dict[str, Any]]


def run(settings: Twin) -> Made:
    """Make the twin, print its table and, last, its folder. The same settings find it done, or go on after a kill.

    Raises a ProxytuneError for a text, base, layers or name that will not do, before anything is measured.
    """
    text = read_text(settings.text, settings.held_out)
    tokenizer = load_tokenizer(settings.base)
    base = identify(settings.base, tokenizer)
    ways = settings.model_dump(mode="json", include=WAYS)
    name = name_of(settings)
    draft = {
        "name": name,
        "key": hash_json([base.model_dump(include={"weights", "tokenizer"}), text.files, ways]),
        "base": base.model_dump(),
        "text": text.files,
        "settings": ways,
        "code": record.code_version(),
    }
    folder = settings.outputs / "twins" / name
    work = settings.outputs / "training" / f"twin-{name}-{draft['key'][:16]}"
    with locked(settings.outputs / "training" / f"twin-{name}.lock"):
        recipe = published(folder, draft["key"])
        if recipe is None:
            if not settings.resume:
                remove_folder(work)
            recipe = make(settings, tokenizer, text, draft, work, folder)
        remove_folder(work)
    console().print(table(recipe))
    print(folder)
    return Made(folder, recipe)


def make(settings: Twin, tokenizer, text: Text, draft: dict[str, Any], work: Path, folder: Path) -> dict[str, Any]:
    """Cut, heal and measure in `work`, then move the finished folder to `folder`. Returns the recipe."""
    base = load_model(settings.base, "float32")  # mixed precision is the healing's business
    check(settings, base)
    training = windows(text.training, tokenizer, settings.window, "to heal on")
    held_out = some(windows(text.held_out, tokenizer, settings.window, "held out"), settings.evaluation_windows)
    config = settings.model_dump(mode="json", exclude={"command"})
    with record.start(
        settings.tracker, settings.outputs, stage="twin", task="", family="", config=config, command=settings.command
    ) as tracked:
        calibration = some(training, settings.calibration_windows)
        influence = once(work / "influence.json", lambda: twins.influence(base, calibration))
        kept = twins.most_influential(influence, settings.layers)
        twin = twins.cut(base, kept)
        losses = once(work / "losses.json", lambda: {
            "base": twins.held_out_loss(base, held_out), "cut": twins.held_out_loss(twin, held_out)
        })  # fmt: skip
        done = twins.heal(twin, base, training, settings.heal, work, seed=settings.seed, log=tracked.log)
        losses["healed"] = twins.held_out_loss(twin, held_out)
        finished = work / "finished"
        remove_folder(finished)
        with told(finished), quiet():
            twin.save_pretrained(finished)
            tokenizer.save_pretrained(finished)
        made = identify(ModelRef(model=str(finished)), tokenizer)
        recipe = draft | {
            "weights": made.weights,
            "parameters": {"base": base.num_parameters(), "twin": twin.num_parameters()},
            "layers": {"of": len(influence), "kept": kept, "influence": [round(value, 6) for value in influence]},
            "held_out": {"tokens": held_out.numel(), "loss": losses, "perplexity": perplexities(losses)},
            "healing": {
                "steps": settings.heal.steps,
                "tokens": settings.heal.steps * settings.heal.batch_size * settings.window,
                "curve": curve(done.losses),
                "seconds": round(done.seconds, 1),
            },
        }
        write_json(finished / RECIPE, recipe)
        seal(finished)
        replace_folder(finished, folder)
        tracked.summary({f"perplexity/{model}": value for model, value in perplexities(losses).items()})
        tracked.artifact(f"twin-{recipe['name']}", "model", folder, {"base": recipe["base"], "layers": kept})
    return recipe


def read_text(files: list[Path], held_out: float) -> Text:
    """The paragraphs of all files, each once. A paragraph's hash says whether it is held out."""
    if not files:
        raise DataError("no text to heal on", "text=[FILE,...] takes .txt and .jsonl files")
    parts: dict[bool, dict[str, None]] = {False: {}, True: {}}
    told_of = []
    for path in files:
        found = paragraphs(path.expanduser())
        for paragraph in found:
            place = int(hashlib.sha256(paragraph.encode()).hexdigest()[:8], 16) / 2**32
            parts[place < held_out][paragraph] = None
        told_of.append({"file": path.name, "sha256": hash_file(path.expanduser()), "paragraphs": len(found)})
    return Text(list(parts[False]), list(parts[True]), told_of)


def paragraphs(path: Path) -> list[str]:
    """A text file's paragraphs, a blank line apart, or each row's text of a JSONL file."""
    try:
        content = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "text=[FILE,...] takes files") from None
    match path.suffix.lower():
        case ".txt":
            found = re.split(r"\n\s*\n", content)
        case ".jsonl":
            lines = enumerate(content.split("\n"), 1)
            found = [text_of(line, f"{path}, line {number}") for number, line in lines if line.strip()]
        case _:
            raise DataError(f"{path} is in no form that can be read", "text=[FILE,...] takes .txt and .jsonl files")
    found = [paragraph.strip() for paragraph in found if paragraph.strip()]
    if not found:
        raise DataError(f"{path} holds no text")
    return found


def text_of(line: str, where: str) -> str:
    row = parsed(line.encode(), where)
    text = next((row[key] for key in TEXT_KEYS if key in row), None) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{where}: the row has no text", f"one of {', '.join(TEXT_KEYS)} must be a text")
    check_whole(text, f"{where}: the text")
    return text


def name_of(settings: Twin) -> str:
    """The name asked for, else `base-name-10-layers`. Raises SettingsError for one that is no name of a folder."""
    if settings.name is None:
        return safe_name(f"{Path(settings.base.model).name}-{settings.layers}-layers")
    if safe_name(settings.name) != settings.name:
        raise SettingsError(f"name={settings.name} cannot name a folder", "letters, digits, and _ . - between them")
    return settings.name


def published(folder: Path, key: str) -> dict[str, Any] | None:
    """The recipe of a twin that is there already; StorageError if it was made in another way, or is damaged."""
    if not folder.exists():
        return None
    recipe = read_json(folder / RECIPE) if (folder / RECIPE).is_file() else {}
    if recipe.get("key") != key:
        raise StorageError(f"{folder} is there already, made in another way", "remove it, or give another name=")
    ref = ModelRef(model=str(folder))
    if identify(ref, load_tokenizer(ref)).weights != recipe["weights"]:
        raise StorageError(f"{folder} is damaged: its weights are not those of its {RECIPE}", "remove it")
    return recipe


def windows(paragraphs: list[str], tokenizer, length: int, what: str) -> Tensor:
    found = twins.windows(paragraphs, tokenizer, length)
    if not len(found):
        raise DataError(
            f"the text {what} fills no window of {length} tokens", "give more text=, or change window= or held_out="
        )
    return found


def check(settings: Twin, base) -> None:
    """Refuse layers that cannot be dropped and windows that the base cannot read."""
    count = len(twins.blocks(base)[1])
    if settings.layers >= count:
        raise SettingsError(
            f"layers={settings.layers}: {settings.base.model} has {count} layers", f"keep between 1 and {count - 1}"
        )
    longest = base.config.get_text_config().max_position_embeddings
    if settings.window > longest:
        raise SettingsError(f"window={settings.window}: {settings.base.model} has {longest} positions", "lower it")


def some(windows_NT: Tensor, most: int) -> Tensor:
    """At most so many windows, evenly from all of them."""
    return windows_NT[:: math.ceil(len(windows_NT) / most)]


def once(path: Path, measure: Callable[[], Any]) -> Any:
    """What was measured before a kill is read, not measured again."""
    if not path.is_file():
        write_json(path, measure())
    return read_json(path)


def perplexities(losses: dict[str, float]) -> dict[str, float]:
    return {model: round(math.exp(loss), 3) for model, loss in losses.items()}


def curve(losses: list[float]) -> list[list[float]]:
    """[last step, mean loss] of some fifty stretches of equal length."""
    stretch = math.ceil(len(losses) / CURVE_POINTS) or 1
    parts = [losses[first : first + stretch] for first in range(0, len(losses), stretch)]
    return [[first * stretch + len(part), round(sum(part) / len(part), 4)] for first, part in enumerate(parts)]


def table(recipe: dict[str, Any]) -> Table:
    """Base, cut and healed: their size and their perplexity on held-out text."""
    layers, size = recipe["layers"], recipe["parameters"]
    title = f"{recipe['name']}: layers {' '.join(map(str, layers['kept']))} of {recipe['base']['model']}"
    shown = tight(title=title, title_justify="left")
    shown.add_column("model")
    for name in ("layers", "parameters", "held-out loss", "perplexity"):
        shown.add_column(name, justify="right")
    for model, loss in recipe["held_out"]["loss"].items():
        whole = model == "base"
        count = layers["of"] if whole else len(layers["kept"])
        perplexity = recipe["held_out"]["perplexity"][model]
        shown.add_row(model, str(count), f"{size['base' if whole else 'twin']:,}", f"{loss:.3f}", f"{perplexity:,.2f}")
    return shown
