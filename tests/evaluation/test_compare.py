from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from pipelines import cli
from proxytune.errors import DataError
from proxytune.evaluation.compare import Group, compare, mcnemar, read
from proxytune.evaluation.intervals import mean_interval
from proxytune.evaluation.summary import Scores, build
from proxytune.files import write_json, write_jsonl

N = 120
RANDOM = np.random.default_rng(3)
DIFFICULTY = RANDOM.random(N)


def hits(skill: float, seed: int = 0) -> np.ndarray:
    """Rows answered rightly: hard rows are hard for everybody."""
    return (DIFFICULTY + np.random.default_rng(seed).normal(0, 0.1, N) < skill).astype(float)


def run(
    folder: Path,
    *,
    alpha: float = 1.0,
    ids=None,
    task: str = "gsm8k",
    metric: str = "exact_match",
    digests: list[str] | None = None,
    **right,
) -> Path:
    """A run's folder: of each system the rows that it had right."""
    ids = ids or [f"test-{i}" for i in range(N)]
    scores = [
        Scores(name, alpha if name == "steered" else None, None, None, rows, metric, list(ids), None, digests)
        for name, rows in right.items()
    ]
    made = build(task, "tiny", scores, expert="x@v1", split="test", samples=50)
    write_jsonl(folder / "scores.jsonl", [one.told() for one in scores])
    write_json(folder / "summary.json", made)
    return folder


def table(*groups: Group, samples: int = 400):
    return compare(groups, samples=samples)


def difference(found, of: str, against: str) -> dict:
    return next(one for one in found["differences"] if (one["of"]["run"], one["against"]["run"]) == (of, against))


def test_runs_on_the_same_rows_are_paired(tmp_path):
    good = Group("good", [read(run(tmp_path / "a", base=hits(0.3), steered=hits(0.62)))])
    better = Group("better", [read(run(tmp_path / "b", base=hits(0.3), steered=hits(0.7)) / "summary.json")])
    found = table(good, better)
    between = difference(found, "better", "good")
    assert between["paired_rows"] == N and between["value"] == pytest.approx((hits(0.7) - hits(0.62)).mean())
    other = read(run(tmp_path / "c", ids=[f"other-{i}" for i in range(N)], base=hits(0.3), steered=hits(0.7)))
    alone = difference(table(good, Group("other", [other])), "other", "good")
    assert alone["paired_rows"] == 0 and alone["value"] == between["value"] and alone["mcnemar"] is None
    wide, narrow = (one["ci"][1] - one["ci"][0] for one in (alone, between))
    assert narrow < 0.6 * wide
    assert found["verdicts"][-1].startswith("steered of better beats steered of good on exact match")
    assert "no row in common" in table(good, Group("other", [other]))["verdicts"][-1]


def test_rows_that_only_one_run_has_are_left_out_of_the_difference(tmp_path):
    some = [f"test-{i}" for i in range(60, 60 + N)]
    first = Group("first", [read(run(tmp_path / "a", base=hits(0.3), steered=hits(0.5)))])
    second = Group("second", [read(run(tmp_path / "b", ids=some, base=hits(0.3), steered=hits(0.5)))])
    between = difference(table(first, second), "second", "first")
    assert between["paired_rows"] == 60
    assert between["value"] == pytest.approx(hits(0.5)[:60].mean() - hits(0.5)[60:].mean())


def test_seeds_are_pooled_by_row_and_are_no_further_rows(tmp_path):
    same = [read(run(tmp_path / str(i), base=hits(0.3), steered=hits(0.5))) for i in range(3)]
    pooled, single = table(Group("x", same)), table(Group("x", same[:1]))
    line, alone = (next(one for one in found["lines"] if one["system"] == "steered") for found in (pooled, single))
    assert (line["runs"], line["rows"], line["value"]) == (3, N, alone["value"])
    assert line["ci"] == pytest.approx(alone["ci"])  # runs that do not differ change nothing
    unlike = [read(run(tmp_path / f"u{i}", base=hits(0.3), steered=hits(0.5, i), alpha=i / 2)) for i in range(3)]
    line = next(one for one in table(Group("x", unlike))["lines"] if one["system"] == "steered")
    values = [hits(0.5, i).mean() for i in range(3)]
    assert line["range"] == [pytest.approx(min(values)), pytest.approx(max(values))]
    assert line["value"] == pytest.approx(np.mean(values)) and line["alphas"] == [0.0, 0.5, 1.0]
    as_if_new = mean_interval_of_all([hits(0.5, i) for i in range(3)])
    assert line["ci"][1] - line["ci"][0] > 1.3 * as_if_new


def test_a_pooled_interval_is_over_rows_and_runs(tmp_path):
    apart = [
        read(run(tmp_path / f"a{i}", base=hits(0.5), steered=hits(skill))) for i, skill in enumerate((0.2, 0.5, 0.8))
    ]
    found = table(Group("apart", apart), samples=2000)
    base, steered = (next(one for one in found["lines"] if one["system"] == name) for name in ("base", "steered"))
    width = steered["ci"][1] - steered["ci"][0]
    assert width > 2 * (base["ci"][1] - base["ci"][0])  # which is of rows alone: all runs have one base
    rates = [hits(skill).mean() for skill in (0.2, 0.5, 0.8)]
    rows = 0.5 * 0.5 / N
    assert width == pytest.approx(2 * 1.96 * (np.var(rates) / 3 + rows) ** 0.5, rel=0.2)
    # Steered and base of one run are drawn together: what all of a run's systems share cancels in their difference.
    lucky = [read(run(tmp_path / f"l{i}", base=hits(s), steered=hits(s + 0.1))) for i, s in enumerate((0.2, 0.5, 0.8))]
    (difference, *_) = table(Group("lucky", lucky), samples=2000)["differences"]
    assert difference["excludes_zero"] and difference["ci"][1] - difference["ci"][0] < 0.5 * width


def test_a_row_is_never_held_against_another_of_the_same_name(tmp_path, capsys):
    digests = [f"{i}" for i in range(N)]
    first = run(tmp_path / "a", digests=digests, base=hits(0.3), steered=hits(0.5))
    same = run(tmp_path / "b", digests=digests, base=hits(0.3), steered=hits(0.6))
    other = run(tmp_path / "c", digests=[*digests[:7], "x", *digests[8:]], base=hits(0.3), steered=hits(0.6))
    prints = [json.loads((path / "summary.json").read_text())["rows_fingerprint"] for path in (first, same, other)]
    assert prints[0] == prints[1] != prints[2] and all(prints)
    assert cli.main(["compare", str(first), str(same)]) == 0
    capsys.readouterr()
    for given in ([str(first), str(other)], [f"pooled={first},{other}"]):
        assert cli.main(["compare", *given]) == 3
        assert capsys.readouterr().err.startswith(
            f"proxytune: row 'test-7' of {other} is another than that of {first} ("
        )
    unknown = run(tmp_path / "d", base=hits(0.3), steered=hits(0.6))  # made before there were digests
    assert cli.main(["compare", str(first), str(unknown)]) == 0


def test_a_comparison_is_kept_as_a_run_where_that_is_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = run(tmp_path / "a", base=hits(0.3), expert=hits(0.4), steered=hits(0.6))
    second = run(tmp_path / "b", base=hits(0.3), expert=hits(0.4), steered=hits(0.5))
    given = ["compare", f"one={first}", f"two={second}", "--outputs", str(tmp_path / "outputs"), "--samples", "50"]
    assert cli.main(given) == 0 and not (tmp_path / "outputs").exists()
    shown = capsys.readouterr().out
    assert cli.main([*given, "--tracker", "wandb", "--project", "tests"]) == 0
    assert capsys.readouterr().out.endswith(shown)
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" and record["wandb"]["mode"] == "offline"
    assert record["summary"]["one/steered/exact_match"] == pytest.approx(hits(0.6).mean())
    lines = [json.loads(line) for line in (folder / "tables" / "comparison.jsonl").read_text().splitlines()]
    assert [line["system"] for line in lines] == ["base", "expert", "steered"] * 2
    assert json.loads((folder / "comparison.json").read_text())["verdicts"]
    assert list((tmp_path / "outputs").glob("wandb/offline-run-*"))


def mean_interval_of_all(each: list[np.ndarray]) -> float:
    """The width of the interval if rows of several seeds were rows of their own."""
    from proxytune.evaluation.intervals import Measured

    values = np.concatenate(each)
    found = mean_interval(Measured([str(i) for i in range(len(values))], values, np.ones(len(values))), samples=400)
    return found.high - found.low


def test_a_steered_model_that_loses_is_named_in_words(tmp_path):
    losing = run(tmp_path / "a", base=hits(0.5), expert=hits(0.8), steered=hits(0.3))
    words = table(Group("mine", [read(losing)]))["verdicts"]
    assert words == [
        f"steered of mine is worse than {other} on exact match (95% interval, 120 paired rows)."
        for other in ("base", "expert")
    ]
    toxic = run(tmp_path / "b", metric="toxic", base=hits(0.5), steered=hits(0.3))
    assert table(Group("mine", [read(toxic)]))["verdicts"][0].startswith("steered of mine beats base on toxic")


def test_the_gap_closed_is_told_of_each_group_and_where_it_says_nothing(tmp_path, capsys):
    right = {"base": hits(0.3), "expert": hits(0.5), "steered": hits(0.6)}
    clear = run(tmp_path / "a", **right, tuned=hits(0.8))
    close = run(tmp_path / "b", **right, tuned=hits(0.31))
    same = run(tmp_path / "c", **right, tuned=hits(0.3))
    groups = [Group(name, [read(path)]) for name, path in (("a", clear), ("b", close), ("c", same))]
    found = table(*groups)
    first, second, third = found["gaps_closed"]
    share = (hits(0.6).mean() - hits(0.3).mean()) / (hits(0.8).mean() - hits(0.3).mean())
    assert first["value"] == pytest.approx(share) and first["ci"][0] < share < first["ci"][1] and not first["unstable"]
    assert second["unstable"] and third == {
        "run": "c", "measure": "exact_match", "value": None, "ci": [None, None], "unstable": True, "backwards": False
    }  # fmt: skip
    summary = json.loads((clear / "summary.json").read_text())["gap_closed"]["metric"]
    assert summary["value"] == pytest.approx(first["value"])
    assert not table(Group("x", [read(run(tmp_path / "d", base=hits(0.3), steered=hits(0.6)))]))["gaps_closed"]
    for form in ("terminal", "markdown"):
        assert cli.main(["compare", f"a={clear}", f"b={close}", "--format", form]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"Gap to tuned closed by steered of a: exact match {share:.0%} [" in shown
        assert "unstable: base and tuned cannot be told apart." in shown
    assert cli.main(["compare", str(clear), str(same), "--format", "csv"]) == 0
    assert [row["system"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))][-2:] == ["gap closed"] * 2


def test_outputs_that_could_not_be_read_are_counted_over_all_runs(tmp_path):
    paths = [run(tmp_path / str(i), base=hits(0.3), steered=hits(0.5)) for i in range(2)]
    for path, count in zip(paths, (3, 4), strict=True):
        summary = json.loads((path / "summary.json").read_text())
        summary["rows"] = [row | ({"unparsed": count} if row["system"] == "base" else {}) for row in summary["rows"]]
        write_json(path / "summary.json", summary)
    lines = table(Group("x", [read(path) for path in paths]))["lines"]
    assert [(line["system"], line["unparsed"]) for line in lines] == [("base", 7), ("steered", None)]


def test_mcnemar_is_exact():
    of, against = [1.0] * 9 + [0.0] + [1.0] * 5, [0.0] * 9 + [1.0] + [1.0] * 5
    assert mcnemar(of, against) == pytest.approx(2 * 11 / 1024)  # 1 of 10 or fewer, twice
    assert mcnemar([1.0, 0.0], [1.0, 0.0]) == 1.0
    assert mcnemar([0.5], [1.0]) is None
    assert mcnemar([1.0] * 3000, [0.0] * 3000) == 0.0


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, capsys):
    first = run(tmp_path / "a", base=hits(0.5), steered=hits(0.5))
    second = run(tmp_path / "b", task="qa", base=hits(0.5), steered=hits(0.5))
    assert cli.main(["compare", str(first), str(second)]) == 3
    assert capsys.readouterr().err == (
        "proxytune: these runs measured gsm8k (test) and qa (test) (compare runs of one task or benchmark)\n"
    )
    (first / "scores.jsonl").unlink()
    with pytest.raises(DataError, match=r"no scores\.jsonl .*run it again"):
        read(first)
    with pytest.raises(DataError, match=r"no summary\.json in"):
        read(tmp_path)


def test_the_table_comes_in_every_form(tmp_path, capsys):
    first = run(tmp_path / "a", base=hits(0.3), expert=hits(0.4), steered=hits(0.6))
    second = run(tmp_path / "b", base=hits(0.3), expert=hits(0.4), steered=hits(0.5))
    given = [f"one={first}", f"two={second},{second}", "--samples", "50"]
    assert cli.main(["compare", *given]) == 0
    shown = capsys.readouterr().out
    assert "gsm8k, test rows" in shown and "is worse than steered of one" in shown and "McNemar p" in shown
    assert cli.main(["compare", *given, "--format", "markdown", "--out", str(tmp_path / "t.md")]) == 0
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert (
        lines[0].startswith("| run | system | alpha | runs | rows | unparsed |")
        and len({line.count("|") for line in lines[:8]}) == 1
    )
    capsys.readouterr()
    cli.main(["compare", *given, "--format", "csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["system"] for row in rows[:6]] == ["base", "expert", "steered"] * 2
    assert float(rows[2]["value"]) == pytest.approx(hits(0.6).mean()) and rows[-1]["against_run"] == "one"
    cli.main(["compare", *given, "--format", "json"])
    assert json.loads(capsys.readouterr().out)["differences"][-1]["paired_rows"] == N
