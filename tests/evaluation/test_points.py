from __future__ import annotations

from dataclasses import replace

import pytest

from proxytune.decoding.request import Limits
from proxytune.errors import StorageError
from proxytune.evaluation import points, system
from proxytune.evaluation.points import Measure, Point
from proxytune.evaluation.system import System
from proxytune.settings import Decode
from proxytune.tasks import qa
from tests.decoding.tiny_models import END, ByteTokenizer, mixture

ROWS = [{"id": f"r{i}", "prompt": "p", "completion": "AB"} for i in range(5)]
PROMPTS = [{"base": [1 + i], "expert": [2 + i, 3], "anti": [4]} for i in range(5)]
COMPLETIONS = [[1, 2, END][: 1 + i % 3] for i in range(5)]
MEASURE = Measure(qa.TASK, ROWS, "f00d", Decode(), Limits(4), generate=True)
POINT = Point("steered", 0.5, {"base": "b", "expert": "e"})


SYSTEM = System("steered", mixture(), ByteTokenizer(), {}, {}, frozenset(), END)


def scored(measure: Measure, alphas: list[float]):
    return list(points.compute(measure, SYSTEM, [(alpha,) for alpha in alphas], PROMPTS, COMPLETIONS))


def test_a_point_is_read_back_as_it_was_kept_whatever_was_said(tmp_path):
    said = [{"id": "a", "text": "line\u2028 and \x85 and \n and \ud7ff"}, {"id": "b", "text": ""}]
    assert points.kept(tmp_path, MEASURE, POINT) is None
    points.keep(tmp_path, MEASURE, POINT, said)
    assert points.kept(tmp_path, MEASURE, POINT) == said


@pytest.mark.parametrize(
    "measure, point",
    [
        (replace(MEASURE, fingerprint="beef"), POINT),
        (replace(MEASURE, generate=False), POINT),
        (replace(MEASURE, decode=Decode(temperature=0.5)), POINT),
        (replace(MEASURE, decode=Decode(seed=1)), POINT),
        (replace(MEASURE, limits=Limits(5)), POINT),
        (replace(MEASURE, limits=Limits(4, stop=("\n",))), POINT),
        (replace(MEASURE, dtype="bfloat16"), POINT),
        (MEASURE, replace(POINT, alpha=0.25)),
        (MEASURE, replace(POINT, system="expert", alpha=None)),
        (MEASURE, replace(POINT, models={"base": "b", "expert": "other"})),
    ],
)
def test_whatever_changes_a_number_changes_the_name(measure, point):
    assert measure.key(point) != MEASURE.key(POINT)


def test_batch_sizes_and_what_is_not_generated_change_no_name():
    assert replace(MEASURE, score_batch_size=7, decode=Decode(batch_size=1)).key(POINT) == MEASURE.key(POINT)
    loss_only = replace(MEASURE, generate=False)
    assert replace(loss_only, decode=Decode(seed=9)).key(POINT) == loss_only.key(POINT)


@pytest.mark.parametrize("scoring, writing", [(1, 5), (2, 3), (9, 2)])
def test_many_alphas_in_any_batches_give_the_records_of_one_alpha_at_a_time(scoring, writing):
    alphas = [-1.0, 0.0, 0.3, 1.0]
    batched = replace(MEASURE, score_batch_size=scoring, decode=Decode(batch_size=writing))
    for alpha, records in zip(alphas, scored(batched, alphas), strict=True):
        (alone,) = scored(replace(MEASURE, score_batch_size=1, decode=Decode(batch_size=1)), [alpha])
        assert [row.pop("loss") for row in records] == pytest.approx([row.pop("loss") for row in alone], rel=1e-9)
        assert records == alone


def test_a_record_holds_the_loss_its_tokens_the_reply_and_every_metric():
    (records,) = scored(MEASURE, [1.0])
    assert [row["id"] for row in records] == ["r0", "r1", "r2", "r3", "r4"]
    assert [row["tokens"] for row in records] == [1, 2, 3, 1, 2]
    assert all(row["loss"] > 0 and row["metrics"].keys() == {"exact_match"} and "text" in row for row in records)
    assert scored(replace(MEASURE, generate=False), [1.0])[0][0].keys() == {"id", "row", "loss", "tokens"}


def test_replies_that_a_killed_run_left_are_not_written_again(tmp_path, monkeypatch):
    alphas = [(0.0,), (1.0,)]
    parts = [MEASURE.part(tmp_path, replace(POINT, alpha=alpha)) for (alpha,) in alphas]
    how = (MEASURE, SYSTEM, alphas, PROMPTS, COMPLETIONS)
    whole = points.compute(*how, parts)
    lines = [part.read_text().splitlines(keepends=True) for part in parts]
    assert [len(each) for each in lines] == [6, 6]  # the losses, and a line for each reply
    parts[0].write_text("".join(lines[0][:4]) + lines[0][4][:20])  # cut in the middle of a line
    written = []
    build = system.build
    monkeypatch.setattr(system, "build", lambda *args: counted(build(*args), written))
    assert points.compute(*how, parts) == whole and written == [2]
    points.keep(tmp_path, MEASURE, replace(POINT, alpha=0.0), whole[0])
    assert not parts[0].exists() and parts[1].exists()


def test_losses_that_were_kept_before_memory_ran_out_are_not_computed_again_in_smaller_batches(tmp_path, monkeypatch):
    alphas = [(0.0,), (1.0,)]
    only = replace(MEASURE, generate=False)
    parts = [only.part(tmp_path, replace(POINT, alpha=alpha)) for (alpha,) in alphas]
    real, weighed = points.losses, []

    def losses(mixture, rows, alphas, **how):
        weighed.append(len(rows))
        if len(weighed) == 2:
            raise MemoryError
        yield from real(mixture, rows, alphas, **how)

    monkeypatch.setattr(points, "losses", losses)
    how = (SYSTEM, alphas, PROMPTS, COMPLETIONS)
    with pytest.raises(MemoryError):
        points.compute(only.at_most(3), *how, parts)
    found = points.compute(only.at_most(1), *how, parts)
    assert weighed == [3, 2, 1, 1]
    assert points.compute(only.at_most(5), *how, parts) == found and weighed == [3, 2, 1, 1]
    monkeypatch.undo()
    for one, other in zip(found, points.compute(only, *how), strict=True):
        assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in other], rel=1e-6)


def counted(engine, written):
    run = engine.run
    engine.run = lambda requests: written.append(len(requests)) or run(requests)
    return engine


def test_a_damaged_point_is_told_and_not_read(tmp_path):
    points.keep(tmp_path, MEASURE, POINT, [{"id": "a"}, {"id": "b"}])
    path = MEASURE.path(tmp_path, POINT)
    path.write_text(path.read_text()[:-5])
    with pytest.raises(StorageError, match=r"damaged.*remove it"):
        points.kept(tmp_path, MEASURE, POINT)


def test_a_place_where_nothing_can_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "outputs").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"cannot write .*outputs/points"):
        points.keep(tmp_path / "outputs", MEASURE, POINT, [])
