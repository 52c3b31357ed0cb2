"""What makes a model that very model: hashes of its weights and of its tokenizer."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from proxytune.errors import ModelError
from proxytune.files import hash_file, hash_json
from proxytune.settings import ModelRef, Section

_SHA256 = re.compile(r"[0-9a-f]{64}")


class ModelId(Section):
    """A checkpoint: where it came from, and SHA-256 of its weight files and of its id-by-id vocabulary."""

    model: str
    revision: str | None
    weights: str
    tokenizer: str

    def same_model(self, other: ModelId) -> bool:
        return (self.weights, self.tokenizer) == (other.weights, other.tokenizer)


def identify(ref: ModelRef, tokenizer) -> ModelId:
    """The identity of the checkpoint that `ref` names now; hashes weight files unless the hub's cache knows them."""
    return ModelId(
        model=ref.model,
        revision=ref.revision,
        weights=_hash_weights(ref),
        tokenizer=hash_tokenizer(tokenizer),
    )


def stamp(ref: ModelRef) -> list[tuple[str, int, int]]:
    """What tells the checkpoint that `ref` names now from another in its place, unread: files, sizes, times."""
    files = sorted(file for file in _folder(ref).iterdir() if file.is_file())
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def hash_tokenizer(tokenizer) -> str:
    """SHA-256 over (token, id) of every token, added ones included."""
    return hash_json(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))


def _hash_weights(ref: ModelRef) -> str:
    files = sorted(_folder(ref).glob(ref.gguf_file or "*.safetensors"))
    if not files:
        raise ModelError(
            f"{ref.model} has no {ref.gguf_file or '.safetensors weights'}",
            "convert it with transformers' save_pretrained",
        )
    quantised = ref.quantization or ""  # the same files, another model
    return hashlib.sha256(("".join(map(_hash_of, files)) + quantised).encode()).hexdigest()


def _folder(ref: ModelRef) -> Path:
    """A local model's, or where the hub's cache keeps the one that `from_pretrained` just loaded; no network."""
    from huggingface_hub import try_to_load_from_cache

    from proxytune.models.loading import locate  # imports torch, which a look at the registry does not need

    if (folder := Path(locate(ref))).is_dir():
        return folder
    found = try_to_load_from_cache(ref.model, ref.gguf_file or "config.json", revision=ref.revision)
    if not isinstance(found, str):
        raise ModelError(f"{ref.model} is not in the local cache", "load it once while online")
    return Path(found).parent


def _hash_of(file: Path) -> str:
    """The hub's cache names large files by their own SHA-256: no need to read 140 GB again."""
    name = file.resolve().name
    return name if file.is_symlink() and _SHA256.fullmatch(name) else hash_file(file)
