"""What a checkpoint says of itself before its weights are loaded: its configuration, and the headers of its files."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxytune.settings import ModelRef

# Bytes of one number, by the names that safetensors and torch give its type.
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}
BYTES |= {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Described:
    """config, generation: transformers' own, None where the checkpoint has none. stored: numbers by their type."""

    config: Any = None
    generation: Any = None
    stored: Counter[str] = field(default_factory=Counter)

    @property
    def text(self) -> Any:
        return None if self.config is None else self.config.get_text_config()

    @property
    def soft_cap(self) -> float | None:
        return getattr(self.text, "final_logit_softcapping", None)

    @property
    def parameters(self) -> int:
        return sum(self.stored.values())

    @property
    def dtype(self) -> str | None:
        """The type of most numbers."""
        return self.stored.most_common(1)[0][0] if self.stored else None

    def token_bytes(self, size: int) -> int:
        """Keys and values of one token where a number takes `size` bytes; 0 where the configuration does not say."""
        text = self.text
        heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 0)
        width = getattr(text, "head_dim", None) or (
            getattr(text, "hidden_size", 0) // max(1, getattr(text, "num_attention_heads", 1))
        )
        return 2 * getattr(text, "num_hidden_layers", 0) * heads * width * size


def describe(ref: ModelRef, *, weights: bool = True) -> Described:
    """All that can be had without loading; what a checkpoint lacks is left out. weights=False reads no headers."""
    from transformers import AutoConfig, GenerationConfig

    from proxytune.models.loading import locate

    where, config, generation = locate(ref), None, None
    file = {"gguf_file": ref.gguf_file} if ref.gguf_file else {}
    with contextlib.suppress(Exception):  # broken files raise nearly anything; loading tells of them
        config = AutoConfig.from_pretrained(where, revision=ref.revision, trust_remote_code=False, **file)
    with contextlib.suppress(Exception):
        generation = GenerationConfig.from_pretrained(where, revision=ref.revision or "main")
    return Described(config, generation, _stored(where, ref) if weights else Counter())


def _stored(where: str, ref: ModelRef) -> Counter[str]:
    """Numbers by type, from the headers of local files, else of the hub's, of which no more is read."""
    from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata, try_to_load_from_cache

    folder = Path(where)
    with contextlib.suppress(ValueError):  # a path that is not there is no name on the hub either
        cached = None if folder.is_dir() else try_to_load_from_cache(ref.model, "config.json", revision=ref.revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    adapter = folder / "adapter_model.safetensors"
    folder = adapter if adapter.is_file() else folder
    with contextlib.suppress(Exception):
        return Counter(get_local_safetensors_metadata(folder).parameter_count)
    if not Path(where).is_dir():
        with contextlib.suppress(Exception):
            return Counter(get_safetensors_metadata(ref.model, revision=ref.revision).parameter_count)
    return Counter()


def free_memory(device: str) -> int | None:
    """Bytes that can be had now, on all GPUs together where device is not cpu; None where the system does not say."""
    if device != "cpu":
        import torch

        return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    with contextlib.suppress(OSError, LookupError, ValueError):  # Linux alone tells
        told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(told["MemAvailable"].split()[0]) * 1024
    return None
