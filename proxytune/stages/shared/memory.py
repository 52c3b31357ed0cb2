"""Memory that a trio will take against what is there, reckoned from the headers of its files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from proxytune.errors import ModelError
from proxytune.models.described import BYTES, Described, describe, free_memory
from proxytune.models.members import separable
from proxytune.models.trio import ExpertFiles
from proxytune.settings import ModelRef, Steering

PROMPT = 512  # tokens of a prompt, where keys and values are reckoned
QUANTISED = {"8bit": 1.0, "int8": 1.0, "4bit": 0.5}  # bytes of a number


def told(
    settings: Steering,
    refs: Mapping[str, ModelRef],
    described: Mapping[str, Described],
    adapters: Mapping[str, tuple[str, bool]],
    reply: int,
) -> Iterator[str]:
    """A line for each model, and the sum. adapters: the role of an adapter's model, and whether it is merged into it.
    reply: tokens of the longest.

    Raises ModelError where it does not fit.
    """
    needed: dict[str, float] = defaultdict(float)
    rows = settings.base.in_flight if settings.base else settings.decode.batch_size
    tokens = PROMPT + reply
    for role, ref in refs.items():
        found = described[role]
        if role == "base" and settings.base is not None:
            yield f"base: at {settings.base.url}; nothing of it is loaded here"
        elif not found.parameters:
            yield f"{role}: not known, there are no safetensors headers to be had"
        else:
            device, size, name = _placed(settings.family.dtype, ref, found)
            under, merged = adapters.get(role, (role, False))
            numbers = found.parameters + (described[under].parameters if merged else 0)
            own = described[under].token_bytes(4 if name == "float32" else 2)
            cache = rows * tokens * own
            needed[device] += numbers * size + cache
            kept = f" and {_spoken(cache)} of keys and values" if cache else ""
            stored = f"stored as {found.dtype}, " if found.dtype else ""
            yield f"{role}: {numbers:,} numbers, {stored}{name} here: {_spoken(numbers * size)}{kept}"
    for device, wanted in needed.items():
        there = free_memory(device)
        if there is None:
            yield f"together {_spoken(wanted)}; how much is free on this {device} cannot be told"
        elif wanted > there:
            raise ModelError(
                f"together {_spoken(wanted)} are needed on the {device} and {_spoken(there)} are free",
                "family.dtype=bfloat16, a smaller decode.batch_size or base, or a base behind an API (base=)",
            )
        else:
            have = f"{_spoken(there)} free on the {device}"
            yield f"together {_spoken(wanted)} of {have}, for {rows} rows of {tokens} tokens"


def before(base: ModelRef, experts: Sequence[ExpertFiles], dtype: str, served: bool) -> str:
    """What a trio's weights will take, before any is loaded: base + small + adapter, and what is free there."""
    sizes = {} if served else {"base": _weights(base, base, dtype)}
    for expert in experts:
        small, own = ModelRef(model=expert.anti.model, revision=expert.anti.revision), str(expert.folder)
        sizes[f"small {small.model}"] = _weights(small, small, dtype)
        if expert.adapter and separable(expert.folder):
            sizes[f"adapter {expert.name}"] = _weights(ModelRef(model=own), small, dtype)
        else:
            sizes[f"expert {expert.name}"] = _weights(small if expert.adapter else ModelRef(model=own), small, dtype)
    told = " + ".join(f"{name} {_spoken(size) if size else 'of unknown size'}" for name, size in sizes.items())
    device = _placed(dtype, base, Described())[0]
    there, together = free_memory(device), sum(sizes.values())
    free = "" if there is None else f"; {_spoken(there)} free on the {device}"
    short = ", which is too little" if there is not None and together > there else ""
    return f"{told} = {_spoken(together)}{free}{short}"


def _weights(ref: ModelRef, placed: ModelRef, dtype: str) -> float:
    """Bytes of a checkpoint's numbers once loaded as those of `placed`; 0 where its files do not say."""
    found = describe(ref)
    return found.parameters * _placed(dtype, placed, found)[1]


def _placed(dtype: str, ref: ModelRef, found: Described) -> tuple[str, float, str]:
    """(device, bytes of a number, what it is called) once loaded."""
    import torch

    device = ref.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = "cpu" if device == "cpu" else "GPU"
    if dtype == "auto":
        dtype = "float32" if kind == "cpu" else found.dtype or "F16"
    if ref.quantization:
        return kind, QUANTISED[ref.quantization], ref.quantization
    return kind, BYTES.get(dtype, 2), dtype


def _spoken(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
