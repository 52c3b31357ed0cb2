"""A model of the lm-evaluation-harness: a base steered by registered experts, through the same engine as everywhere.

    lm_eval --model proxytune --model_args expert=code@best,alpha=0.6,base=meta-llama/Llama-3.1-70B --tasks arc_easy

Releases of lm_eval up to 0.4.13 do not look for models in other packages. With those the same command line is given to
`python -m proxytune.evaluation.harness` instead of `lm_eval`.

base, anti and a plain expert read the harness's context as it is; an expert that was tuned on chats reads it as a turn
of the user. With --apply_chat_template each model reads the chat by its own template, and as plain text where it has
none. Probabilities are over the ids that all models share, so a head with more rows than that gives a little less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from proxytune import api
from proxytune.decoding.engine import Engine
from proxytune.decoding.request import Limits, Request
from proxytune.decoding.scoring import Given, check, scored
from proxytune.errors import SettingsError
from proxytune.evaluation.system import System, of_trio
from proxytune.models.prompts import encode, plain_text, rendered
from proxytune.steering.choice import Sampling
from proxytune.tracking.progress import track

BATCH = 32
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("proxytune")
class Proxytune(TemplateLM):
    """expert, alpha: several are joined by `+`. base: None takes the one of the expert's family. max_length: of prompt
    and reply in tokens; None takes what the models read. The harness's own arguments for other models are refused.
    """

    def __init__(
        self,
        expert: str,
        alpha: float | str | None = None,
        base: str | None = None,
        outputs: str | Path = "outputs",
        dtype: str = "auto",
        batch_size: int | str | None = None,
        max_length: int | None = None,
        drafter: str = "expert",
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        alphas = None if alpha is None else [float(part) for part in str(alpha).split("+")]
        size = int(batch_size or 0) if str(batch_size or "").isdigit() else BATCH
        found = api.load(str(expert).split("+"), base, alpha=alphas, outputs=outputs, dtype=dtype)
        (system,) = of_trio(found.trio, {"steered": found.mixture})
        self._measure(system, found.alphas, size, max_length, drafter)

    @classmethod
    def of(
        cls,
        system: System,
        alphas: Sequence[float] = (),
        batch_size: int = BATCH,
        max_length: int | None = None,
        drafter: str = "expert",
    ) -> Proxytune:
        """Any system that is loaded already, such as the base or the expert alone."""
        made = cls.__new__(cls)
        made._measure(system, alphas, batch_size, max_length, drafter)
        return made

    def _measure(
        self, system: System, alphas: Sequence[float], batch_size: int, max_length: int | None, drafter: str
    ) -> None:
        TemplateLM.__init__(self)
        self.system, self.alphas, self.batch_size, self.drafter = system, tuple(alphas), batch_size, drafter
        self.mixture, self.tokenizer = system.mixture, system.tokenizer
        self._device = self.mixture.base.source.device
        self.max_length = max_length or self.mixture.longest or 2048
        self.chats: dict[str, dict[str, str]] = {}
        self.shortened = 0  # rows whose context was cut on the left, as the harness does it

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self._ids(self.tokenizer, string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the first model reads it. How the others read it is remembered by that text."""
        texts = {
            role: rendered(chat_history, self.system.tokenizers[role], add_generation_prompt)
            if self.system.tokenizers[role].chat_template
            else plain_text(chat_history)
            for role in self.system.roles
        }
        first = texts[self.mixture.base.role]
        self.chats[first] = texts
        return first

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            parts = [(("", ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(nats for nats, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        asked = []
        for place, (context, given) in enumerate(request.args for request in requests):
            how: dict[str, Any] = dict(normalize_gen_kwargs(given))
            room = self.max_length - how["max_gen_toks"]
            if room <= 0:
                what = f"a task writes {how['max_gen_toks']} tokens and the models read {self.max_length} in all"
                raise SettingsError(what, "its generation_kwargs.max_gen_toks must be less")
            prompts = self._cut(self._prompts(context), room)
            chosen = {name: how[name] for name in SAMPLING if how.get(name) is not None}
            stops = tuple(stop for stop in how["until"] if stop)
            limits = Limits(how["max_gen_toks"], self.system.end_ids, stops)
            asked.append(Request(prompts, limits, self.alphas, Sampling(**chosen, seed=place)))
        engine = Engine(self.mixture, self.tokenizer, batch_size=self.batch_size, drafter=self.drafter)
        found = dict(track(engine.run(asked), "replies", len(asked)))
        for place, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[place].text)
        return [found[place].text for place in range(len(asked))]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding says it) of each continuation."""
        given = [self._given(context, ids, reply) for (context, _), ids, reply in requests]
        own = self.mixture.base.role
        order = sorted(range(len(given)), key=lambda i: -len(given[i].prompts[own]) - len(given[i].completion))
        found: dict[int, tuple[float, bool]] = {}
        batches = -(-len(order) // self.batch_size)
        places = (order[at * self.batch_size : (at + 1) * self.batch_size] for at in range(batches))
        for batch in places if disable_tqdm else track(places, "likelihoods", batches):
            for i, told in zip(batch, self._weigh([given[i] for i in batch]), strict=True):
                found[i] = told
                if requests[i][0] != ("", ""):
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], told)
        return [found[i] for i in range(len(given))]

    @torch.inference_mode()
    def _weigh(self, batch: Sequence[Given]) -> Iterator[tuple[float, bool]]:
        for row, scores in zip(batch, scored(self.mixture, batch), strict=True):
            steered_TV = self.mixture.combine(scores, self.alphas)
            wanted_T1 = torch.tensor(list(row.completion), device=steered_TV.device)[:, None]
            check(steered_TV.amax(-1))
            logs_T = steered_TV.log_softmax(-1).gather(-1, wanted_T1)[:, 0]
            yield float(logs_T.sum()), bool((steered_TV.argmax(-1) == wanted_T1[:, 0]).all())

    def _given(self, context: str, ids: list[int], reply: list[int]) -> Given:
        """The harness's own ids for the first model where it reads them as they are."""
        roles, first = self.system.roles, self.mixture.base.role
        prompts = self._prompts(context, trimmed=True) if context.strip() else dict.fromkeys(roles, ids)
        if self.system.formats[first] == "plain":
            prompts = {**prompts, first: ids}
        return Given(self._cut(prompts, max(1, self.max_length + 1 - len(reply))), reply)

    def _cut(self, prompts: dict[str, list[int]], room: int) -> dict[str, list[int]]:
        """What does not fit is cut on the left, as the harness's own models do, and counted."""
        self.shortened += any(len(ids) > room for ids in prompts.values())
        return {role: ids[-room:] for role, ids in prompts.items()}

    def _prompts(self, context: str, *, trimmed: bool = False) -> dict[str, list[int]]:
        """What each role reads of a context: a chat that was put into templates here, or a text.

        trimmed: without spaces at the end, which the harness moves to the continuation.
        """
        chat = next((text for text in self.chats if context.startswith(text)), None)
        found = {}
        for role in self.system.roles:
            tokenizer = self.system.tokenizers[role]
            text = context if chat is None else self.chats[chat][role] + context[len(chat) :]
            text = text.rstrip() if trimmed else text
            if chat is None and self.system.formats[role] == "chat":
                found[role] = encode(text, tokenizer, "chat")
            else:
                found[role] = self._ids(tokenizer, text, None)
        return found

    @staticmethod
    def _ids(tokenizer, text: str, special: bool | None) -> list[int]:
        """With the tokenizer's own special tokens, unless the text begins with one already."""
        bos = tokenizer.bos_token
        special = (not (bos and text.startswith(bos))) if special is None else special
        return tokenizer.encode(text, add_special_tokens=special)


def main() -> None:
    """lm_eval's own command line, with this model registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
