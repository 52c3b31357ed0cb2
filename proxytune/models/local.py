"""A source that is a transformers model in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from proxytune.errors import ModelError
from proxytune.files import resource
from proxytune.models.quiet import quiet
from proxytune.settings import ModelRef

EMBEDDED = "embedded:"


class LocalSource:
    """A causal language model of transformers as a source, its scores cut to the first `vocabulary` ids.

    `uncap_at` undoes soft-capping at that value; None leaves scores as they are.
    """

    def __init__(self, model, vocabulary: int | None = None, uncap_at: float | None = None):
        self.model = model.eval()
        self.vocabulary = vocabulary or model.config.get_text_config().vocab_size
        self.uncap_at = uncap_at

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def soft_cap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def start(self, prompts: Sequence[Sequence[int]]) -> tuple[LocalStream, Tensor]:
        stream = LocalStream(self, prompts)
        return stream, stream.first_scores

    @torch.inference_mode()
    def score(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Tensor]:
        rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        width = max(map(len, rows)) - 1  # the last token of a row is only predicted, never read
        ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for i, row in enumerate(rows):
            ids_BT[i, : len(row) - 1] = torch.tensor(row[:-1])
            mask_BT[i, : len(row) - 1] = 1
        keep = min(map(len, prompts)) - 1  # no prompt ends before this position
        logits_BTV = self.model(
            input_ids=ids_BT.to(self.device),
            attention_mask=mask_BT.to(self.device),
            logits_to_keep=torch.arange(keep, width, device=self.device),
            use_cache=False,
        ).logits
        return [
            self.cut(logits_BTV[i, len(prompt) - 1 - keep : len(row) - 1 - keep])
            for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]

    def cut(self, logits: Tensor) -> Tensor:
        """Raw logits (..., rows of lm_head) to scores (..., V), soft-capping undone where asked."""
        from proxytune.steering.arithmetic import uncap

        scores = logits[..., : self.vocabulary]
        return uncap(scores, self.uncap_at) if self.uncap_at else scores


class LocalStream:
    """Sequences in progress: padded on the left, so that every row's newest token stands in the last column.

    A row's positions count its own tokens only, and padding is masked, so its neighbours do not change its scores.
    """

    @torch.inference_mode()
    def __init__(self, source: LocalSource, prompts: Sequence[Sequence[int]]):
        from transformers import DynamicCache

        self.source = source
        width = max(map(len, prompts))
        ids_BT = torch.zeros(len(prompts), width, dtype=torch.int64)
        self.mask_BT = torch.zeros_like(ids_BT)
        for i, prompt in enumerate(prompts):
            ids_BT[i, width - len(prompt) :] = torch.tensor(list(prompt))
            self.mask_BT[i, width - len(prompt) :] = 1
        self.mask_BT = self.mask_BT.to(source.device)
        self.cache = DynamicCache(config=source.model.config)
        self.first_scores = self._forward(ids_BT.to(source.device), (self.mask_BT.cumsum(-1) - 1).clamp(min=0))

    @torch.inference_mode()
    def advance(self, tokens_B: Tensor) -> Tensor:
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(self.mask_BT[:, :1])], dim=-1)
        return self._forward(tokens_B.to(self.source.device)[:, None], self.mask_BT.sum(-1, keepdim=True) - 1)

    def keep(self, rows: Tensor) -> None:
        rows = rows.to(self.source.device)
        self.mask_BT = self.mask_BT[rows]
        self.cache.batch_select_indices(rows)

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        logits_B1V = self.source.model(
            input_ids=ids_BT,
            attention_mask=self.mask_BT,
            position_ids=positions_BT,
            past_key_values=self.cache,
            logits_to_keep=1,
            use_cache=True,
        ).logits
        return self.source.cut(logits_B1V[:, -1])


def locate(ref: ModelRef) -> str:
    """What `from_pretrained` takes: a folder for embedded and local models, else the hub's name."""
    if ref.model.startswith(EMBEDDED):
        folder = resource("data") / "tiny" / ref.model.removeprefix(EMBEDDED)
        if not folder.is_dir():
            raise ModelError(f"there is no embedded model {ref.model!r}", "known: embedded:small, embedded:base")
        return str(folder)
    return str(Path(ref.model).expanduser()) if Path(ref.model).expanduser().is_dir() else ref.model


def load_tokenizer(ref: ModelRef):
    """The model's tokenizer. Raises ModelError in one line where it cannot be had."""
    from transformers import AutoTokenizer

    with _told(ref):
        return AutoTokenizer.from_pretrained(locate(ref), revision=ref.revision)


def load_model(ref: ModelRef, dtype: str = "auto", adapter: Path | None = None):
    """The model with evaluation numerics on the best device there is; a LoRA adapter is merged into its weights.

    dtype auto: what the checkpoint says on a GPU, float32 on a CPU. Pickled weights are refused.
    """
    from transformers import AutoModelForCausalLM

    cuda = torch.cuda.is_available()
    chosen = ("auto" if cuda else torch.float32) if dtype == "auto" else getattr(torch, dtype)
    with _told(ref), quiet():
        model = AutoModelForCausalLM.from_pretrained(
            locate(ref), revision=ref.revision, dtype=chosen, use_safetensors=True, trust_remote_code=False
        )
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.to("cuda" if cuda else "cpu").eval()


@contextlib.contextmanager
def _told(ref: ModelRef) -> Generator[None]:
    """Whatever the libraries raise for a model that cannot be had, as one line. Broken files raise nearly anything."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        name = ref.model + (f" at revision {ref.revision}" if ref.revision else "")
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ModelError(
            f"cannot load the model {name}: {kind}{str(error).strip().partition(chr(10))[0]}",
            "check the name and revision, log in with `hf auth login` for gated models, or give a local folder",
        ) from error
