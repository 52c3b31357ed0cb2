"""Where a stop string ends a reply: found as if the whole text were looked at after each token."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxytune.decoding.request import Limits, Reply
from tests.models.tiny_family import tokenizer

TOKENIZER = tokenizer()
TEXTS = st.text(st.sampled_from("ab \n.é€😀#"), min_size=1, max_size=40)


def naive(ids: list[int], stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Ids that are said and the text that is left, by decoding all of them after each."""
    for count in range(1, len(ids) + 1):
        text = TOKENIZER.decode(ids[:count], skip_special_tokens=True)
        cuts = [at for stop in stops if (at := text.find(stop)) >= 0]
        if cuts:
            return count, text[: min(cuts)]
    return None


def written(ids: list[int], stops: tuple[str, ...]) -> tuple[int, str] | None:
    reply, limits = Reply(), Limits(len(ids) + 1, stop=stops)
    for token in ids:
        reply.append(token, limits, TOKENIZER)
        if reply.finish_reason:
            return len(reply.token_ids), reply.text
    return None


@given(TEXTS, st.lists(st.text(st.sampled_from("ab \n.é€😀#"), min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_of_text_end_it_at_the_very_token(text, stops):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert written(ids, tuple(stops)) == naive(ids, tuple(stops))


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=30), st.data())
def test_stop_strings_of_any_ids_end_them_at_the_very_token(ids, data):
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    if not whole:
        return
    at = data.draw(st.integers(0, len(whole) - 1))
    stops = (whole[at : at + data.draw(st.integers(1, 5))], "\n\n")
    assert written(ids, stops) == naive(ids, stops)
