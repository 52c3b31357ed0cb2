"""Where tuning begins: an untuned model or an earlier expert of it, and the adapter that goes on it.

A chain of experts stays one adapter over its first untuned checkpoint, the anti: an adapter that is tuned on is that
same adapter, continued. A whole model that is tuned on is a whole model again, even where an adapter did it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from proxytune.errors import SettingsError, require
from proxytune.files import read_json
from proxytune.models.loading import adapter_told, load_model, load_tokenizer
from proxytune.models.quiet import quiet
from proxytune.settings import ModelRef, Peft


@dataclass(frozen=True)
class Start:
    """The weights that tuning begins with. ref: the untuned model.

    folder: an earlier expert's files, an adapter over `ref` (adapter=True) or a whole model.
    """

    ref: ModelRef
    folder: Path | None = None
    adapter: bool = False

    def kind(self, peft: Peft) -> Literal["lora", "full"]:
        """What comes out of tuning: an adapter over `ref`, or a whole model."""
        return "lora" if peft.name != "none" and (self.folder is None or self.adapter) else "full"

    def model(self, peft: Peft):
        """The model for a trainer; an earlier adapter is on it to be tuned on, or merged where all weights are tuned.

        float32 where the weights themselves are tuned, for mixed precision is the trainer's business. Under an adapter
        they are frozen: as the checkpoint has them on a GPU, and in 4 bits with qlora.
        """
        quantization = "4bit" if peft.name == "qlora" else None
        dtype = "float32" if peft.name == "none" else "auto"
        if peft.name == "none":
            return self.merged(dtype).requires_grad_(True)  # an adapter that was merged left them frozen
        if not self.adapter:
            return self.merged(dtype, quantization)
        from peft import PeftModel

        model = load_model(self.ref.model_copy(update={"quantization": quantization}), dtype)
        with adapter_told(self.folder), quiet():
            return PeftModel.from_pretrained(model, str(self.folder), is_trainable=True)

    def merged(self, dtype: str, quantization: Literal["4bit"] | None = None):
        """The weights as one plain model, any adapter merged."""
        whole = ModelRef(model=str(self.folder)) if self.folder and not self.adapter else self.ref
        ref = whole.model_copy(update={"quantization": quantization}) if quantization else whole
        return load_model(ref, dtype, adapter=self.folder if self.adapter else None)

    def peft_config(self, peft: Peft):
        """PEFT's configuration of a fresh adapter; None where there is none to make."""
        if peft.name == "none" or self.adapter:
            return None
        from peft import LoraConfig

        return LoraConfig(task_type="CAUSAL_LM", **peft.model_dump(exclude={"name", "use_dora"}))


def check_peft(peft: Peft) -> None:
    """SettingsError where qlora cannot run."""
    if peft.name == "qlora":
        require("bitsandbytes", by="peft=qlora")


def continued(peft: Peft, folder: Path) -> Peft:
    """The settings of an adapter that is tuned on: its own shape, whatever else was asked for."""
    with adapter_told(folder):
        written = read_json(folder / "adapter_config.json")
        targets = written["target_modules"]
        shape = {key: written[key] for key in ("r", "lora_alpha", "lora_dropout")}
        shape["target_modules"] = sorted(targets) if isinstance(targets, list) else targets
        return peft.model_copy(update=shape)


def tokenizer_for(ref: ModelRef, chat_template: str | None, chat: bool):
    """The model's tokenizer, with the family's chat template where the rows are messages and it has none of its own."""
    tokenizer = load_tokenizer(ref)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not chat or (tokenizer.chat_template and not chat_template):
        return tokenizer
    if chat_template is None:
        raise SettingsError(
            f"{ref.model} has no chat template and the task's rows are messages",
            "set family.chat_template to a model that has one, or to a .jinja file",
        )
    path, hint = Path(chat_template), "name a model that has one, or a .jinja file"
    try:
        tokenizer.chat_template = (
            path.read_text("utf-8") if path.is_file() else load_tokenizer(ModelRef(model=chat_template)).chat_template
        )
    except (OSError, UnicodeDecodeError) as error:  # a template's own text is too long for a name
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise SettingsError(f"family.chat_template={chat_template[:200]} cannot be read: {why}", hint) from error
    if not tokenizer.chat_template:
        raise SettingsError(f"family.chat_template={chat_template} names a model that has no chat template", hint)
    return tokenizer
