from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune.errors import DataError, SettingsError
from proxytune.evaluation.rubric import MOST, Rubric, score, verdict
from proxytune.experts.self_rewarding import pairs, seed
from proxytune.experts.self_rewarding.pairs import Judged
from proxytune.experts.self_rewarding.propose import Frame, Sieve, shown, stops
from proxytune.settings import load
from proxytune.settings.self_rewarding import Chosen
from proxytune.tasks import preferences, qa

points = st.one_of(st.none(), st.integers(0, 5).map(float))
replies = st.builds(
    Judged,
    text=st.sampled_from(["", " ", "a", " a\n", "b", "c", "d"]),
    scores=st.lists(points, min_size=1, max_size=3).map(tuple),
    whole=st.booleans(),
)


# Pairs


@given(st.lists(replies, max_size=6))
def test_a_pair_is_the_best_whole_reply_over_the_worst_and_never_a_tie(answers):
    found = pairs.best_and_worst(answers)
    judged = [reply for reply in pairs.merged(answers) if reply.mean is not None]
    if isinstance(found, str):
        means = {reply.mean for reply in judged}
        assert (found == "alike") == (len(pairs.merged(answers)) == 1)
        assert found != "ties" or len(means) == 1 or max(r.mean for r in judged if r.whole) == min(means)
        return
    chosen, rejected = found
    assert chosen.mean > rejected.mean and chosen.whole
    assert chosen.text.strip() != rejected.text.strip() and rejected.text.strip()
    assert all(reply.mean <= chosen.mean for reply in judged if reply.whole)
    assert all(reply.mean >= rejected.mean for reply in judged)


@given(st.lists(st.lists(replies, max_size=4), max_size=6))
def test_every_prompt_reply_and_judgement_is_counted_once(answers):
    prompts = [(f"p{n}", f"Question {n}?") for n in range(len(answers))]
    rows, counts = pairs.make(prompts, answers)
    assert counts["prompts"] == len(answers) == sum(counts[outcome] for outcome in pairs.OUTCOMES)
    assert counts["pairs"] == len(rows) == len({row["id"] for row in rows})
    assert counts["replies"] == sum(map(len, answers))
    scores = [score for each in answers for reply in each for score in reply.scores]
    assert (counts["judgements"], counts["unparsed"]) == (len(scores), scores.count(None))
    for row in rows:
        assert row["chosen_score"] > row["rejected_score"]
        assert preferences.read(row)["prompt"] == row["prompt"], "a row that training takes"


def test_judgements_are_averaged_and_those_that_cannot_be_read_count_for_nothing():
    good, bad = Judged("good", (4.0, None, 3.0)), Judged("bad", (3.0, 3.0, 3.0))
    unread = Judged("unread", (None, None, None))
    assert good.mean == 3.5 and unread.mean is None
    assert pairs.best_and_worst([bad, unread, good]) == (good, bad)
    assert pairs.best_and_worst([unread, good]) == "unpaired", "a reply that was not judged is no bad reply"


def test_equal_replies_are_one_with_all_their_judgements():
    twice = [Judged(" same\n", (5.0,)), Judged("same", (1.0,))]
    assert [reply.mean for reply in pairs.merged(twice)] == [3.0]
    assert pairs.best_and_worst(twice) == "alike"
    assert pairs.best_and_worst([*twice, Judged("other", (3.0,))]) == "ties"


def test_a_reply_that_was_cut_may_be_rejected_but_never_chosen():
    cut, whole = Judged("cut", (5.0,), whole=False), Judged("whole", (3.0,))
    assert pairs.best_and_worst([cut, whole]) == "ties"
    worse = Judged("worse, and cut", (1.0,), whole=False)
    assert pairs.best_and_worst([cut, whole, worse]) == (whole, worse)


def test_pairs_of_messages_are_messages_and_begin_with_a_word():
    rows, _ = pairs.make([("m", [{"role": "user", "content": "Hi"}])], [[Judged("a", (1.0,)), Judged("\nb", (2.0,))]])
    assert preferences.read(rows[0])["chosen"] == [{"role": "assistant", "content": "b"}]


# Proposals


def test_what_all_prompts_share_is_a_frame_that_stays_out_of_sight():
    rows = qa.builtin()["train"]
    frame = Frame.of(rows)
    assert (frame.before, frame.after) == ("Question: ", "\nAnswer:")
    assert all(frame.around(frame.inside(row)) == row["prompt"] for row in rows)
    assert frame.inside({"prompt": "Which river?"}) is None


def test_a_frame_ends_between_words():
    rows = [{"prompt": f"Sum of {pair}?"} for pair in ("12 and 13", "14 and 13")]
    frame = Frame.of(rows)
    assert (frame.before, frame.after) == ("Sum of ", " and 13?")


def test_of_messages_only_a_single_question_is_shown():
    user, other = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    frame = Frame.of([{"prompt": [user]}])
    assert frame.inside({"prompt": [user]}) == "Hi" and frame.around("Ho")[0]["content"] == "Ho"
    assert frame.inside({"prompt": [user, other, user]}) is None


def test_the_list_shown_has_each_example_once_and_some_of_its_own_making():
    known, own = [f"known {n}" for n in range(20)], [f"own {n}" for n in range(20)]
    text = shown(known, own, 8, random.Random(0))
    assert text.count("known") == 6 and text.count(": own ") == 2 and text.endswith("\n\nTask 9:")
    assert len({line for line in text.split("\n") if line}) == 9
    assert shown(known[:3], [], 8, random.Random(0)).endswith("Task 4:")


def test_a_proposal_ends_where_the_next_one_begins_or_with_its_line():
    assert stops(["one\n", "two"]) == ("\n",)
    assert all(stop in "three\n\nTask 4:" or stop in "three\nTask 4:" for stop in stops(["one\nand more", "two"]))


def test_a_proposal_is_new_short_and_not_empty():
    sieve = Sieve(["Which river does Ash lie on?", "What is Oak known for?"], 0.7)
    assert sieve.fault(" ?! ") == "empty"
    assert sieve.fault("word " * 40) == "long"
    assert sieve.fault("which river does ash lie on") == "known"
    assert sieve.fault("Which river does Elm lie on?") == "known", "five of six words in order"
    assert sieve.fault("When is the market held?") is None
    assert sieve.fault("When is the market held?") == "known", "the next must differ from it"
    assert Sieve(["Which river does Ash lie on?"], 1.0).fault("Which river does Elm lie on?") is None


# Rows to learn judging from


def test_judging_is_learnt_from_replies_whose_worth_is_known():
    rows = qa.builtin()["train"][:30]
    scored = seed.made_of(rows)
    assert {points for _, _, points, _ in scored} == {0.0, 2.0, 5.0}
    for number, (instruction, response, points, _) in enumerate(scored):
        own = rows[number]["completion"]
        assert instruction == rows[number]["prompt"]
        assert (response == own, response in own) == (points == 5, points > 0)
    for chat in (False, True):
        made = seed.rows(scored, chat, Rubric().question, verdict)
        said = [row["completion"][0]["content"] if chat else row["completion"] for row in made]
        assert [score(text) for text in said] == [points for _, _, points, _ in scored]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([], "must be an object"),
        ({"instruction": "a", "response": "\ud800", "score": 1}, "the row holds half a character"),
        ({"instruction": "a", "score": 1}, "there is no response"),
        ({"instruction": "a", "response": "b", "score": 1, "reason": "\ud800"}, "the row holds half a character"),
        ({"instruction": "a", "response": "b", "score": 6}, "from 0 to 5"),
        ({"instruction": "a", "response": "b", "score": "good"}, "the score is 'good'"),
        ({"instruction": "a", "response": "b", "score": "nan"}, "from 0 to 5"),
    ],
)
def test_a_scored_reply_that_is_none_is_told(row, told):
    with pytest.raises(DataError, match=told):
        seed.read(row, MOST)


def test_a_scored_reply_may_come_with_its_reason():
    row = {"instruction": "a", "response": "b", "score": "3"}
    assert seed.read(row, MOST) == ("a", "b", 3.0, "")
    assert seed.read({**row, "reason": "so so"}, MOST)[3] == "so so"


# Settings


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"roundz": 2}, "unknown key method.roundz .did you mean 'rounds'"),
        ({"judge": {"sample": 2}}, "unknown key method.judge.sample .did you mean 'samples'"),
        ({"judge": {"by": "task"}}, "a proposed prompt has none .add method.prompts=rows"),
        ({"judge": {"url": "http://127.0.0.1:1"}}, "by=self asks no server"),
        ({"judge": {"by": "judge", "url": "http://user:hunter22@host"}}, "the url for host has more .*judge's key"),
        ({"judge": {"by": "judge", "url": "http://host:abc"}}, "method.judge.url='http://host:abc': Port"),
        ({"answers": 1}, "method.answers=1"),
        ({"temperature": 0}, "method.temperature=0"),
    ],
)
def test_a_slip_in_the_method_is_told_by_its_key(method, told):
    with pytest.raises(SettingsError, match=told):
        load(Chosen, {"method": method})
