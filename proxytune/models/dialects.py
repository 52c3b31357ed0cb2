"""How each kind of server is asked for next-token scores, and what its answers say: pure functions of JSON.

Every sampling parameter is sent, since servers have defaults of their own; the scores are asked for as they are before
temperature and penalties. An answer of the wrong shape, model or length raises BadReply.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from proxytune.models.replies import NEVER, BadReply, Query, Spoilt, Told, checked, named


@dataclass(frozen=True)
class Dialect:
    """One kind of server. body: the request of a query; read: its answer, as one Told a position, checked.

    most_top, most_chosen: limits of the protocol (None: none but the vocabulary; 0: cannot be asked). chosen_inside:
    chosen ids may be asked inside prompts too, and beside best ones; chosen_apart: not while best ones are asked for.
    penalise, bias: request fields that penalise repetition, favour an id (temperature is called so by all of them).
    tokenize: path, body for a text, and where the ids are in the answer. unbounded: ids that the server may have left
    out whatever they score.
    """

    name: str
    path: str
    body: Callable[[Query, str | None], dict[str, Any]]
    read: Callable[[dict[str, Any], Query], list[Told]]
    model_in_reply: Callable[[dict[str, Any]], Any]
    prompt_tokens: Callable[[dict[str, Any]], Any]
    penalise: Callable[[], dict[str, Any]]
    bias: Callable[[int], dict[str, Any]]
    most_top: int | None = None
    most_chosen: int | None = 0
    prompt_scores: bool = False
    chosen_inside: bool = False
    chosen_apart: bool = False
    tokenize: tuple[str, Callable[[str, str | None], dict[str, Any]], str] | None = None
    unbounded: tuple[int, ...] = ()

    def parse(self, reply: Any, query: Query, model: str | None) -> list[Told]:
        """The checked answer to a query. Raises BadReply."""
        try:
            if reply.get("error"):
                raise BadReply(f"the server answered with an error: {str(reply['error'])[:200]}")
            served = self.model_in_reply(reply)
            if (
                model is not None
                and served is not None
                and model not in (served, self.name == "openai" and _undated(served))
            ):
                raise BadReply(f"asked for the model {model}, the server answered with {str(served)[:100]}")
            count = self.prompt_tokens(reply)
            if type(count) is not int or count != len(query.ids):
                raise BadReply(
                    f"{len(query.ids)} ids were sent as the prompt, the server read {str(count)[:20]} tokens"
                )
            told = self.read(reply, query)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise BadReply(f"the server's answer has not the shape of {self.name}'s ({type(error).__name__})") from None
        if len(told) != query.positions:
            raise BadReply(f"asked for {query.positions} positions, the server answered {len(told)}")
        return told


def _undated(model: str) -> str:
    """The name that a dated version answers to: gpt-x for gpt-x:20260101."""
    return re.sub(r"[:-]\d{4}-?\d{2}-?\d{2}(-v\d+)?$", "", model)


# vLLM, /v1/completions

_PLACEHOLDER = re.compile(r"token_id:(\d+)")


def _id_of(text: str) -> int:
    found = _PLACEHOLDER.fullmatch(text)
    if not found:
        raise BadReply(f"the server named a token {text[:40]!r} instead of by its id")
    return int(found[1])


def _vllm_body(query: Query, model: str | None) -> dict[str, Any]:
    neutral = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0}
    neutral |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    body = {"model": model, "prompt": list(query.ids), "max_tokens": 1, "stream": False, **neutral}
    body |= {"logprobs": len(query.chosen) or query.top, "return_tokens_as_token_ids": True}
    body |= {"add_special_tokens": False, "skip_special_tokens": False}
    if query.chosen:
        body["logprob_token_ids"] = list(query.chosen)
    if query.positions > 1:
        body["prompt_logprobs"] = query.top
    return body | dict(query.extra)


def _vllm_read(reply: dict[str, Any], query: Query) -> list[Told]:
    choice = reply["choices"][0]
    last = {_id_of(text): score for text, score in choice["logprobs"]["top_logprobs"][0].items()}
    said = _id_of(choice["logprobs"]["tokens"][0])
    if said not in last or last[said] != choice["logprobs"]["token_logprobs"][0]:
        raise BadReply("the server gave two scores for the token it chose")
    if query.chosen:
        return [named(query.chosen, last, said)]
    if len(last) < query.top and all(score <= NEVER for i, score in last.items() if i != said):
        raise Spoilt("the server left the best scores out, as vLLM does beside a request for chosen ids")
    before = []
    if query.positions > 1:
        listed = choice["prompt_logprobs"]
        if len(listed) != len(query.ids):
            raise BadReply(f"{len(query.ids)} ids were sent, the server gave prompt scores for {len(listed)}")
        for actual, scores in zip(query.ids[1 - query.positions :], listed[1 - query.positions :], strict=True):
            before.append(_vllm_ranked(scores, actual, query.top))
    return [*before, checked(list(last.items()), query.top, said=said, apart=said)]


def _vllm_ranked(scores: dict[str, Any], actual: int, count: int) -> Told:
    """Prompt scores: the best ones, and the actual token, each with its rank.

    An actual token beyond the best ones is left out: what is known of a position must not depend on what was drafted.
    """
    ranked = sorted(((int(i), entry) for i, entry in scores.items()), key=lambda item: item[1]["rank"])
    if actual not in dict(ranked):
        raise BadReply("the server left out the score of the prompt's own token")
    pairs = [(i, entry["logprob"]) for i, entry in ranked]
    checked(pairs, count, apart=actual)
    return checked([(i, score) for i, score in pairs if i != actual or len(pairs) == count], count)


# SGLang, /generate


def _sglang_body(query: Query, model: str | None) -> dict[str, Any]:
    # Scores are taken after temperature, except where it is 0: then they are plain.
    neutral = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_new_tokens": 1, "ignore_eos": True}
    neutral |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    body: dict[str, Any] = {"input_ids": list(query.ids), "stream": False}
    body |= {"sampling_params": neutral | dict(query.extra)}
    body |= {"return_logprob": True, "top_logprobs_num": 0 if query.chosen else query.top}
    body |= {"logprob_start_len": len(query.ids) - query.positions if query.positions > 1 else -1}
    return body | {"token_ids_logprob": list(query.chosen or query.beside) or None, "return_text_in_logprobs": False}


def _sglang_read(reply: dict[str, Any], query: Query) -> list[Told]:
    meta = reply["meta_info"]
    said = meta["output_token_logprobs"][0][1]

    def listed(kind: str) -> list[list[list[Any]]]:
        if query.positions == 1:
            return [meta[f"output_{kind}"][0]]
        before = meta[f"input_{kind}"]
        if len(before) != query.positions:
            raise BadReply(f"asked for {query.positions} prompt positions, the server gave {len(before)}")
        return [*before[1:], meta[f"output_{kind}"][0]]  # each is what predicted its own token; the first has none

    def by_id(ids: tuple[int, ...]) -> list[Told]:
        return [named(ids, {entry[1]: entry[0] for entry in each}, said) for each in listed("token_ids_logprobs")]

    if query.chosen:
        return by_id(query.chosen)
    best = [checked([(entry[1], entry[0]) for entry in each], query.top, said=said) for each in listed("top_logprobs")]
    if not query.beside:
        return best
    return [told.merge(more) for told, more in zip(best, by_id(query.beside), strict=True)]


# llama.cpp, /completion


def _llamacpp_body(query: Query, model: str | None) -> dict[str, Any]:
    neutral: dict[str, Any] = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "top_n_sigma": -1.0,
    }
    neutral |= {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "dry_multiplier": 0.0}
    neutral |= {"xtc_probability": 0.0, "mirostat": 0, "dynatemp_range": 0.0, "seed": 0, "logit_bias": []}
    body = {"prompt": list(query.ids), "n_predict": 1, "stream": False, "cache_prompt": True, "ignore_eos": False}
    return body | neutral | {"n_probs": query.top, "post_sampling_probs": False} | dict(query.extra)


def _llamacpp_read(reply: dict[str, Any], query: Query) -> list[Told]:
    if reply["truncated"]:
        raise BadReply("the server cut the prompt")
    position = reply["completion_probabilities"][0]
    pairs = [(entry["id"], entry["logprob"]) for entry in position["top_logprobs"]]
    return [checked(pairs, query.top, said=position["id"])]


# OpenAI, /v1/completions


def _openai_body(query: Query, model: str | None) -> dict[str, Any]:
    body = {"model": model, "prompt": list(query.ids), "max_tokens": 1, "stream": False, "logprobs": query.top}
    body |= {"temperature": 0, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}
    return body | dict(query.extra)


def _openai_read(texts: Mapping[str, int]) -> Callable[[dict[str, Any], Query], list[Told]]:
    """Answers name tokens by their text; -1 in `texts` is one that several ids have.

    A text that is not in `texts` may be any id's: beside it ids are bounded by the mass that is left, and no better.
    """

    def id_of(text: str) -> int | None:
        return texts.get(text, texts.get("\ufffd") if text.startswith("bytes:\\x") else None)  # half a character

    def read(reply: dict[str, Any], query: Query) -> list[Told]:
        listed = reply["choices"][0]["logprobs"]
        pairs = sorted(listed["top_logprobs"][0].items(), key=lambda item: -item[1])
        said, given = listed["tokens"][0], listed["token_logprobs"][0]
        if dict(pairs).get(said, given) != given:
            raise BadReply("the server gave two scores for the token it chose")
        # Ids of one text are one key, so there may be fewer than were asked for; one more is the chosen token.
        if not pairs or len(pairs) > query.top + 1:
            raise BadReply(f"asked for {query.top} scores, the server gave {len(pairs)}")
        extra = len(pairs) == query.top + 1
        if extra and pairs[-1][0] != said:
            raise BadReply("the server gave more scores than were asked for")
        ids = [id_of(text) for text, _ in pairs]
        scored = [(-1 if i is None else i, score) for i, (_, score) in zip(ids, pairs, strict=True)]
        told = checked(scored, len(pairs), said=id_of(said))
        if None in ids:
            named = {i: score for i, score in zip(told.ids, told.scores, strict=True) if i >= 0}
            return [Told([*named], [*named.values()], 0.0, told.said)]
        floor = min(pairs[query.top - 1][1], 0.0) if extra else told.floor
        return [Told(told.ids, told.scores, floor, told.said)]

    return read


_VLLM = Dialect(
    name="vllm",
    path="/v1/completions",
    body=_vllm_body,
    read=_vllm_read,
    model_in_reply=lambda reply: reply["model"],
    prompt_tokens=lambda reply: reply["usage"]["prompt_tokens"],
    penalise=lambda: {"repetition_penalty": 1.9, "presence_penalty": 2.0},
    bias=lambda i: {"logit_bias": {str(i): 100.0}},
    most_chosen=128,
    prompt_scores=True,
    chosen_apart=True,  # vLLM 0.32 leaves the best ones out for every request that it answers in one batch with such
    tokenize=(
        "/tokenize",
        lambda text, model: {"model": model, "prompt": text, "add_special_tokens": False},
        "tokens",
    ),
)

_SGLANG = Dialect(
    name="sglang",
    path="/generate",
    body=_sglang_body,
    read=_sglang_read,
    model_in_reply=lambda reply: None,  # it has none; the probe asks /get_model_info
    prompt_tokens=lambda reply: reply["meta_info"]["prompt_tokens"],
    penalise=lambda: {"repetition_penalty": 1.9, "presence_penalty": 2.0},
    bias=lambda i: {"logit_bias": {str(i): 100.0}},
    most_chosen=1024,
    prompt_scores=True,
    chosen_inside=True,
    tokenize=(
        "/tokenize",
        lambda text, model: {"model": model or "", "prompt": text, "add_special_tokens": False},
        "tokens",
    ),
)

_LLAMACPP = Dialect(
    name="llamacpp",
    path="/completion",
    body=_llamacpp_body,
    read=_llamacpp_read,
    model_in_reply=lambda reply: reply["model"],
    prompt_tokens=lambda reply: reply["tokens_evaluated"],
    penalise=lambda: {"repeat_penalty": 1.9, "repeat_last_n": 64, "presence_penalty": 2.0},
    bias=lambda i: {"logit_bias": [[i, 100.0]]},
    tokenize=(
        "/tokenize",
        lambda text, model: {"content": text, "add_special": False, "parse_special": True},
        "tokens",
    ),
)


def _openai(tokens: Mapping[int, str]) -> Dialect:
    """tokens: the text of every id, as the tokenizer writes one alone."""
    owners: dict[str, list[int]] = {}
    for i, text in tokens.items():
        owners.setdefault(text, []).append(i)
    texts = {text: ids[0] if len(ids) == 1 and "\ufffd" not in text else -1 for text, ids in owners.items() if text}
    return Dialect(
        name="openai",
        path="/v1/completions",
        body=_openai_body,
        read=_openai_read(texts),
        model_in_reply=lambda reply: reply["model"],
        prompt_tokens=lambda reply: reply["usage"]["prompt_tokens"],
        penalise=lambda: {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        bias=lambda i: {"logit_bias": {str(i): 100}},
        most_top=5,
        unbounded=tuple(sorted(set(tokens) - set(texts.values()))),
    )


def dialect(name: str, tokens: Mapping[int, str] | None = None) -> Dialect:
    """The dialect of that name; `openai` needs the text of every id."""
    if name == "openai":
        assert tokens is not None, "the openai dialect names tokens by their texts"
        return _openai(tokens)
    return {"vllm": _VLLM, "sglang": _SGLANG, "llamacpp": _LLAMACPP}[name]
