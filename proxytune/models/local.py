"""A source that is a transformers model in this process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from proxytune.errors import ModelError
from proxytune.models.members import ACTIVE
from proxytune.models.slots import Slots, visible
from proxytune.steering.arithmetic import uncap


class LocalSource:
    """A causal language model of transformers as a source, its scores cut to the first `vocabulary` ids.

    Its members are the bare model, 0, and the adapters that were attached. `uncap_at` undoes soft-capping at that
    value; None leaves scores as they are. Raises ModelError for a model whose state is no cache of keys and values: it
    could not be read again from an earlier position.
    """

    def __init__(self, model, vocabulary: int | None = None, uncap_at: float | None = None):
        self.model = model.eval()
        self.text = model.config.get_text_config()
        self.vocabulary = vocabulary or self.text.vocab_size
        self.uncap_at = uncap_at
        self.kinds = _kinds(model)
        self.device: torch.device = model.device  # asked for in every read, and transformers looks it up each time

    @property
    def rows(self) -> int:
        """Rows of the head: ids that the model has scores for, padding included."""
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def ids(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def soft_cap(self) -> float | None:
        return getattr(self.text, "final_logit_softcapping", None)

    @property
    def longest(self) -> int | None:
        """The positions that the model has; None if it does not say."""
        return getattr(self.text, "max_position_embeddings", None)

    def open(self, rows: int, length: int, members: Sequence[int] = (0,)) -> LocalStream:
        return LocalStream(self, rows, length, tuple(members))

    @torch.inference_mode()
    def score(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        completions: Sequence[Sequence[int]],
        members: Sequence[int] = (0,),
    ) -> list[list[Tensor]]:
        flat = [
            ([*prompt, *completion], len(prompt))
            for each, completion in zip(prompts, completions, strict=True)
            for prompt in each
        ]
        width = max(len(ids) for ids, _ in flat) - 1  # the last token of a row is only predicted, never read
        ids_BT = torch.zeros(len(flat), width, dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for i, (ids, _) in enumerate(flat):
            ids_BT[i, : len(ids) - 1] = torch.tensor(ids[:-1])
            mask_BT[i, : len(ids) - 1] = 1
        keep = min(start for _, start in flat) - 1  # no prompt ends before this position
        ACTIVE.set(tuple(members))
        logits_BTV = self.model(
            input_ids=ids_BT.to(self.device),
            attention_mask=mask_BT.to(self.device),
            logits_to_keep=torch.arange(keep, width, device=self.device),
            use_cache=False,
        ).logits
        scores = [
            self.cut(logits_BTV[i, start - 1 - keep : len(ids) - 1 - keep]) for i, (ids, start) in enumerate(flat)
        ]
        return [scores[i : i + len(members)] for i in range(0, len(scores), len(members))]

    def cut(self, logits: Tensor) -> Tensor:
        """Raw logits (..., rows of lm_head) to scores (..., V), soft-capping undone where asked."""
        scores = logits[..., : self.vocabulary]
        return uncap(scores, self.uncap_at) if self.uncap_at else scores


class LocalStream:
    """Sequences in progress in one model; sequence (row, m) lies at row * M + m of the cache."""

    def __init__(self, source: LocalSource, rows: int, length: int, members: tuple[int, ...]):
        self.source, self.members = source, members
        self.slots = Slots(rows * len(members), length)

    def read(self, tokens_NMQ: Tensor, starts_NM: Tensor, *, first: int = 0, member: int | None = None) -> Tensor:
        logits = self._forward(tokens_NMQ, starts_NM, first, member, logits_to_keep=0)
        return self.source.cut(logits).unflatten(0, tokens_NMQ.shape[:2])

    def fill(self, tokens_NMQ: Tensor, starts_NM: Tensor, *, first: int = 0) -> None:
        self._forward(tokens_NMQ, starts_NM, first, None, logits_to_keep=1)

    def copy(self, row: int, to: int) -> None:
        size = len(self.members)
        self.slots.copy(slice(row * size, (row + 1) * size), slice(to * size, (to + 1) * size))

    @torch.inference_mode()
    def _forward(self, tokens_NMQ: Tensor, starts_NM: Tensor, first: int, member: int | None, logits_to_keep: int):
        size, width = len(self.members), tokens_NMQ.shape[2]
        begin, end = first * size, (first + len(tokens_NMQ)) * size
        rows = slice(begin, end) if member is None else slice(begin + member, end, size)
        ACTIVE.set(self.members if member is None else (self.members[member],))
        starts_N = starts_NM.flatten()
        used = self.slots.aim(rows, starts_N, width)
        device = self.source.device
        positions_NQ = (starts_N[:, None] + torch.arange(width)).to(device, non_blocking=True)
        eager = self.source.model.config._attn_implementation == "eager"
        mask = visible(self.source.kinds, positions_NQ, used, self.source.model.dtype if eager else None)
        return self.source.model(
            input_ids=tokens_NMQ.flatten(0, 1).to(device),
            attention_mask=mask,
            position_ids=positions_NQ,
            past_key_values=self.slots,
            logits_to_keep=logits_to_keep,
            use_cache=True,
        ).logits


def _kinds(model) -> dict[str, int | None]:
    """The kinds of attention layers a model has, each with its window (None: all that came before)."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    names = getattr(config, "layer_types", None) or (["sliding_attention"] if window else ["full_attention"])
    kinds = {"full_attention": None, "sliding_attention": window}
    other = next((name for name in names if name not in kinds), None)
    if other or getattr(model, "_is_stateful", False):
        raise ModelError(
            f"{config.model_type} has {other or 'recurrent'} layers, whose state cannot be read again from an earlier "
            "position",
            "use a model with full or sliding-window attention only",
        )
    return {name: kinds[name] for name in dict.fromkeys(names)}
