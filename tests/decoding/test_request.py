"""Where a stop string ends a reply, as if the whole text were looked at after each token; what is streamed of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxytune.decoding.request import Limits, Reply
from proxytune.decoding.streaming import Pieces
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


def streamed(ids: list[int], limits: Limits) -> tuple[list[str], Reply]:
    """The pieces of a reply of these ids, and the whole."""
    reply, pieces, given = Reply(), Pieces(limits, TOKENIZER), []
    while not reply.finish_reason:
        reply.append(ids[len(reply.token_ids)], limits, TOKENIZER)
        given.append(pieces.next(reply))
    return given, reply


def test_a_stop_string_said_before_it_may_end_the_reply_holds_back_what_follows():
    ids = TOKENIZER("ab\nab ab ab ab", add_special_tokens=False)["input_ids"]
    for least in range(len(ids) + 2):
        given, reply = streamed(ids, Limits(len(ids), stop=("\n",), min_new_tokens=least))
        assert "".join(given) == reply.text == ("ab" if least < len(ids) else "ab\nab ab ab ab")
        assert "ab".startswith("".join(given[:-1]))


@given(TEXTS, st.data())
def test_pieces_make_up_the_whole_text_wherever_stop_strings_stand_and_may_first_end_it(text, data):
    ids, places = TOKENIZER(text, add_special_tokens=False)["input_ids"], st.integers(0, len(text) - 1)
    stops = tuple(text[at : at + data.draw(st.integers(1, 4))] for at in data.draw(st.lists(places, max_size=3)))
    given, reply = streamed(ids, Limits(len(ids), stop=stops, min_new_tokens=data.draw(st.integers(0, len(ids)))))
    assert "".join(given) == reply.text
