"""How a prompt is put to each model, and where a reply ends.

The expert of a chat task sees the prompt in its chat format; base and anti see it plain (as in the paper). Only the
emitted ids are shared, so each model keeps its own prompt ids, positions and cache.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from proxytune.errors import DataError

Turns = str | Sequence[Mapping[str, str]]
Format = Literal["plain", "chat"]


def text_of(turns: Turns) -> str:
    """The plain text of a prompt or completion: itself, or the contents of its messages, a blank line apart."""
    return turns if isinstance(turns, str) else "\n\n".join(turn["content"] for turn in turns)


def plain_text(prompt: Turns) -> str:
    """A prompt without a chat format; messages end in a newline, so that the reply starts a line of its own."""
    return prompt if isinstance(prompt, str) else text_of(prompt) + "\n"


def encode(prompt: Turns, tokenizer, format: Format) -> list[int]:
    """The ids a model reads before the reply. Plain prompts get the tokenizer's own special tokens, such as BOS."""
    if format == "chat":
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        ids = templated(messages, tokenizer, add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        ids = tokenizer(plain_text(prompt)).input_ids
    if not ids:
        raise DataError("a prompt is empty", "give each prompt at least one token")
    return list(ids)


def rendered(turns: Sequence[Mapping[str, str]], tokenizer, opened: bool = True) -> str:
    """A chat as its template writes it, with the next reply opened, or with the last turn left to be gone on with."""
    return templated(turns, tokenizer, tokenize=False, add_generation_prompt=opened, continue_final_message=not opened)


def templated(turns: Sequence[Mapping[str, str]], tokenizer, **how) -> Any:
    """What `apply_chat_template` gives of the turns as `taken`."""
    return taken(turns, tokenizer, **how)[1]


def taken(turns: Sequence[Mapping[str, str]], tokenizer, **how) -> tuple[list[Mapping[str, str]], Any]:
    """(the turns, what `apply_chat_template` gives). A system turn that it refuses opens the first turn of the user.

    Raises DataError with the template's own words where it refuses these turns all the same.
    """
    attempts = [list(turns)]
    if [turn["role"] for turn in turns[:2]] == ["system", "user"]:
        attempts.append(_folded(turns))
    refusal = ""
    for attempt in attempts:
        try:
            found = tokenizer.apply_chat_template(attempt, **how)
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: whatever it raises, it takes no such turns
            refusal = refusal or str(error) or type(error).__name__
            continue
        if attempt is not attempts[0]:
            _tell_folded(tokenizer.name_or_path)
        return attempt, found
    raise DataError(
        f"the chat template of {tokenizer.name_or_path} refuses these turns: {refusal}",
        "mend the prompt's roles, or name another template with family.chat_template",
    )


def _folded(turns: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    system, first, *rest = turns
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


@lru_cache(maxsize=64)
def _tell_folded(name: str) -> None:
    """Once for each tokenizer."""
    what = "takes no system turn: its text opens the first turn of the user"
    print(f"proxytune: the chat template of {name} {what}", file=sys.stderr)


def encode_completion(prompt: Turns, completion: Turns, tokenizer, end_id: int | None) -> list[int]:
    """The ids of a reply as they follow the plain prompt, with the end token. The same for every model."""
    before, after = plain_text(prompt), text_of(completion)
    prompt_ids, whole = tokenizer(before).input_ids, tokenizer(before + after).input_ids
    if whole[: len(prompt_ids)] == prompt_ids:
        ids = whole[len(prompt_ids) :]
    else:  # the edge was merged into one token: take the reply by itself
        ids = tokenizer(after, add_special_tokens=False).input_ids
    if ids and ids[-1] == end_id:
        ids = ids[:-1]
    return [*ids, end_id] if end_id is not None else list(ids)


def end_of_turn(tokenizer) -> int | None:
    """The special token that closes an assistant's turn in the chat format (it may differ from EOS), or None.

    None too where the template refuses such a turn: a model that reads plain text needs none.
    """
    if not tokenizer.chat_template:
        return None
    mark = "proxytune"
    turns: list[dict[str, Any]] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
    try:
        rest = templated(turns, tokenizer, tokenize=False).rpartition(mark)[2]
    except DataError:
        return None
    ids = tokenizer(rest, add_special_tokens=False).input_ids
    return next((i for i in ids if i in tokenizer.all_special_ids or i in tokenizer.added_tokens_decoder), None)


def end_id(chat: Any | None, plain: Any, vocabulary: Container[int]) -> int:
    """The token that closes a reply: the end of a turn where a chat tokenizer is given, else EOS of the plain one.

    An end of turn that not all models know cannot be said: then replies end as the plain one's do.
    """
    turn = end_of_turn(chat) if chat is not None else None
    return turn if turn is not None and turn in vocabulary else plain.eos_token_id


def end_ids(tokenizers: Sequence[Any], generation_configs: Sequence[Any]) -> frozenset[int]:
    """Every id that ends a reply: the union over the models of EOS, their generation settings and the end of a turn."""
    found: set[int | None] = set()
    for tokenizer in tokenizers:
        found |= {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    for config in generation_configs:
        eos = getattr(config, "eos_token_id", None)
        found |= set(eos) if isinstance(eos, list) else {eos}
    return frozenset(i for i in found if i is not None)
