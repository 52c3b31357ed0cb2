from __future__ import annotations

import json
import math

import pytest

from proxytune.analysis.divergence import divergences
from proxytune.analysis.tokens import Said, records
from proxytune.decoding.engine import build
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.request import Limits, Request
from proxytune.decoding.scoring import Given, losses
from proxytune.models.source import Term
from proxytune.models.vocabulary import Vocabulary
from proxytune.settings import Decode
from proxytune.steering.variants import Variant
from tests.decoding.tiny_models import END, SIZE, ByteTokenizer, mixture, source

PROMPTS = [{"base": [5, 6], "expert": [9, 8, 7], "anti": [5, 6]}, {"base": [11], "expert": [12], "anti": [11]}]
TEXTS = [[3, 14, 15, 9, 2, 6], [5, 3]]


def said(texts=TEXTS) -> list[Said]:
    return [Said(str(i), "asked", PROMPTS[i % 2], ids) for i, ids in enumerate(texts)]


def looked_at(mixed=None, alpha=1.0, texts=TEXTS, **options) -> list[dict]:
    batches = records(mixed or mixture(), said(texts), [alpha], ByteTokenizer(), **options)
    return [record for batch in batches for record in batch]


def test_the_probabilities_of_a_reply_are_those_of_its_loss():
    given = [Given(PROMPTS[i], ids) for i, ids in enumerate(TEXTS)]
    ((wanted, other),) = losses(mixture(), given, [[0.7]])
    found = looked_at(alpha=0.7)
    assert [-sum(r["logprobs"]["steered"]) for r in found] == pytest.approx([wanted[0], other[0]], abs=1e-3)


def test_alpha_zero_changes_nothing():
    for record in looked_at(alpha=0.0):
        assert record["logprobs"]["steered"] == record["logprobs"]["base"]
        assert record["ranks"]["steered"] == record["ranks"]["base"]
        assert record["top"]["steered"] == record["top"]["base"] and set(record["kl"]) == {0.0}


@pytest.mark.parametrize("rules", [{}, {"base_top_p": 0.5}, {"alpha_by": "position", "alpha_steps": 4}])
def test_every_token_that_was_chosen_greedily_is_steered_s_likeliest(rules):
    mixed = mixture(foreign=(4, 7))
    engine = build(mixed, ByteTokenizer(), Decode())
    limits = Limits(12, frozenset([END]))
    requests = [Request(prompts, limits, (1.5,), variant=Variant(**rules)) for prompts in PROMPTS]
    replies = [reply.token_ids for _, reply in sorted(engine.run(requests), key=lambda pair: pair[0])]
    found = looked_at(mixed, 1.5, replies, variant=Variant(**rules))
    assert [set(record["ranks"]["steered"]) for record in found] == [{1}, {1}]
    assert any(r["top"]["base"][t][0] != r["ids"][t] for r in found for t in range(len(r["ids"])))


def test_batches_change_nothing_and_an_empty_text_has_no_tokens():
    texts = [TEXTS[0], [], TEXTS[1], [8]]
    one, all_at_once = looked_at(texts=texts, batch_size=1), looked_at(texts=texts, batch_size=9)
    for a, b in zip(one, all_at_once, strict=True):
        assert a["ids"] == b["ids"]
        if a["ids"]:
            assert a["ranks"] == b["ranks"] and a["kl"] == pytest.approx(b["kl"], abs=1e-3)
    assert one[1] == {"id": "1", "prompt": "asked", "ids": [], "pieces": []}


def test_only_the_likeliest_are_kept_and_json_holds_them():
    (record, _) = looked_at(mixture(foreign=(3,)), texts=[[5, 2], [1]], top=3)
    assert all(len(row) == 3 for role in ("base", "steered") for row in record["top"][role])
    assert set(record["words"]) == {str(i) for role in record["top"].values() for row in role for i in row}
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["pieces"] == ["E", "B"]
    assert 3 not in {i for role in record["top"].values() for row in role for i in row}


def test_the_base_is_its_own_equal_and_the_expert_that_of_a_base_that_is_the_anti():
    anti = Term(source(3, 2), "anti")
    swapped = Mixture(Term(source(3, 2), "base"), Vocabulary(SIZE, ()), ((Term(source(2, 2), "expert"), anti),))
    prompts = {"base": [5, 6], "expert": [5, 6], "anti": [5, 6]}
    given = [Given(prompts, TEXTS[0])]
    ((row,),) = divergences(swapped, given, [[0.0], [0.5], [1.0]])
    (at_zero, half, at_one) = row
    assert at_zero[0] == 0 and at_zero[1] > 0
    assert at_one[1] == pytest.approx(0, abs=1e-6) and at_one[0] == pytest.approx(
        _kl(swapped, prompts, TEXTS[0]), rel=1e-4
    )
    assert 0 < half[0] < at_one[0] and 0 < half[1] < at_zero[1]


def _kl(mixed: Mixture, prompts, ids) -> float:
    """KL(expert || base) by hand: numbers of plain lists."""
    total = 0.0
    (expert, _), base = mixed.pairs[0], mixed.base
    each = [term.source.score([[prompts[term.role]]], [ids])[0][0].double().log_softmax(-1) for term in (expert, base)]
    for of, against in zip(*(scores.tolist() for scores in each), strict=True):
        total += sum(math.exp(a) * (a - b) for a, b in zip(of, against, strict=True))
    return total
