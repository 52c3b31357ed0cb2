"""Models and tokenizers from the hub, a folder, or the embedded family, with every failure told in one line."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Generator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from proxytune.errors import ModelError, ProxytuneError, out_of_memory, require
from proxytune.files import resource
from proxytune.models import online
from proxytune.models.quiet import quiet
from proxytune.settings import ModelRef

EMBEDDED = "embedded:"
WHERE_FROM = "check the name and revision, log in with `hf auth login` for gated models, or give a local folder"
TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"  # a warning of transformers; we refuse such prompts


def locate(ref: ModelRef) -> str:
    """What `from_pretrained` takes: a folder for embedded and local models, else the hub's name."""
    if ref.model.startswith(EMBEDDED):
        folder = resource("data") / "tiny" / ref.model.removeprefix(EMBEDDED)
        if not folder.is_dir():
            raise ModelError(f"there is no embedded model {ref.model!r}", "known: embedded:small, embedded:base")
        return str(folder)
    if (folder := Path(ref.model).expanduser()).is_dir():
        return str(folder)
    online.settle()
    return ref.model


def load_tokenizer(ref: ModelRef):
    """The model's tokenizer. Raises ModelError in one line where it cannot be had."""
    from transformers import AutoTokenizer

    with told(_named(ref)):
        # said, not left open: where nothing is said, transformers asks at a terminal whether to run the model's code
        named = {"revision": ref.revision, "trust_remote_code": False, **_file(ref)}
        found: Any = AutoTokenizer.from_pretrained(locate(ref), **named)
    found.deprecation_warnings[TOO_LONG] = True
    return found


def load_model(ref: ModelRef, dtype: str = "auto", adapter: Path | None = None):
    """The model with evaluation numerics; a LoRA adapter is merged into its weights.

    dtype auto: what the checkpoint says on a GPU, float32 on a CPU. Pickled weights are refused, and so is a checkpoint
    that names other weights than its own.
    """
    from transformers import AutoModelForCausalLM

    device = ref.device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = (torch.float32 if device == "cpu" else "auto") if dtype == "auto" else getattr(torch, dtype)
    with told(_named(ref)), quiet():
        _check_whole(ref)
        model = AutoModelForCausalLM.from_pretrained(
            locate(ref),
            revision=ref.revision,
            dtype=chosen,
            use_safetensors=True,
            trust_remote_code=False,
            **_file(ref),
            **_quantised(ref, device),
        )
        if adapter is not None:
            from peft import PeftModel

            with adapter_told(adapter):
                tuned = PeftModel.from_pretrained(model, str(adapter))
            _untie(model)
            model = tuned.merge_and_unload()
        # Weights that were quantised or spread while loading stay where they were put.
        return (model if ref.quantization or device == "auto" else model.to(device)).eval()


def _untie(model) -> None:
    """Where an adapter changes embeddings or a head that share weights, give the head its own: merging changes one."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(hasattr(end, "base_layer") for end in ends) and ends[0].weight is ends[1].weight:
        head = getattr(ends[1], "base_layer", ends[1])
        head.weight = torch.nn.Parameter(head.weight.detach().clone())


def _file(ref: ModelRef) -> dict[str, Any]:
    return {"gguf_file": ref.gguf_file} if ref.gguf_file else {}


def _quantised(ref: ModelRef, device: str) -> dict[str, Any]:
    """What `from_pretrained` is told of weights that are not loaded as they are."""
    from transformers import GgufConfig

    told: dict[str, Any] = {"device_map": "auto"} if device == "auto" else {}
    if ref.gguf_file:
        told |= {"quantization_config": GgufConfig(dequantize=True)}
    if ref.quantization:
        placed = device if device == "auto" else {"": device}
        told |= {"quantization_config": _few_bits(ref.quantization), "device_map": placed}
    return told


def _few_bits(name: str) -> Any:
    """transformers' configuration of a quantisation."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    require("torchao" if name == "int8" else "bitsandbytes", by=f"quantization={name}")
    if name == "int8":
        return TorchAoConfig(import_module("torchao.quantization").Int8WeightOnlyConfig())
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of casts in each layer of every forward
    return BitsAndBytesConfig(
        load_in_8bit=name == "8bit",
        load_in_4bit=name == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _check_whole(ref: ModelRef) -> None:
    """ModelError where the files beside the weights name others to be read: of another model, pickled, or elsewhere.

    transformers would take them, and no hash of this model covers them.
    """
    from transformers.utils import cached_file

    def read(name: str) -> dict[str, Any] | None:
        found = cached_file(locate(ref), name, revision=ref.revision, _raise_exceptions_for_missing_entries=False)
        return json.loads(Path(found).read_text("utf-8")) if found else None

    if read("adapter_config.json") is not None:
        what = f"{ref.model} has an adapter_config.json, so it is an adapter and no whole model"
        raise ModelError(what, "merge it into its model, or take the file away from a whole one")
    index, config = read("model.safetensors.index.json") or {}, read("config.json") or {}
    for name in (config.get("transformers_weights") or "model.safetensors", *index.get("weight_map", {}).values()):
        if Path(name).name != name or not name.endswith((".safetensors", ".safetensors.index.json")):
            what = f"{ref.model} names {name} for its weights"
            raise ModelError(what, "weights are taken as .safetensors beside its config.json alone")


def _named(ref: ModelRef) -> str:
    return f"the model {ref.model}" + (f" at revision {ref.revision}" if ref.revision else "")


@contextlib.contextmanager
def told(what: str, hint: str = WHERE_FROM) -> Generator[None]:
    """Whatever the libraries raise for a model that cannot be had, as one line. Broken files raise nearly anything."""
    try:
        yield
    except ProxytuneError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise ModelError(
                f"there is not enough memory for {what}", "quantization=4bit, device=auto, or a smaller model"
            ) from error
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ModelError(f"cannot load {what}: {kind}{str(error).strip().partition(chr(10))[0]}", hint) from error


def adapter_told(folder: Path | None) -> contextlib.AbstractContextManager[None]:
    return told(f"the adapter {folder}", "tune or import the expert again")
