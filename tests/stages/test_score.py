from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines import cli
from proxytune.errors import DataError, ModelError, SettingsError
from proxytune.files import read_jsonl
from proxytune.settings import Benchmark, Fields, Judge, Score, load
from proxytune.stages import score
from tests.evaluation import isolation
from tests.evaluation.test_judges import Api
from tests.tasks.test_row_files import written

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = ROOT.parent / "shared" / "data"
GSM = [
    {"question": "a?", "answer": "18", "model_output": "So 18."},
    {"question": "b?", "answer": "1,200", "model_output": "It is 1200 Question: what is 3?"},
    {"question": "c?", "answer": "7", "model_output": "I do not know"},
    {"question": "d?", "answer": "#### 5", "model_output": "5 or 6"},
]


def run(path: Path, name: str = "gsm8k", fields: dict | None = None, **given):
    own = {key: given.pop(key) for key in list(given) if key in Benchmark.model_fields}
    return score.run(
        Score(benchmark=Benchmark(name=name, **own), predictions=path, fields=Fields(**fields or {}), **given)
    )


# What is printed


def test_the_last_line_of_stdout_is_one_json_object_and_the_table_is_on_stderr(tmp_path):
    path = written(tmp_path / "p.jsonl", *GSM)
    command = [sys.executable, "-m", "pipelines.cli", "score", "benchmark=gsm8k", f"predictions={path}"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, ran.stderr
    (line,) = ran.stdout.splitlines()
    found = json.loads(line)
    assert (found["exact_match"], found["n"], found["unparsed"]) == (0.5, 4, 1)
    low, high = found["intervals"]["exact_match"]
    assert 0 <= low < 0.5 < high <= 1
    assert "gsm8k: 4 rows, 4 outputs, 1 unparsed" in ran.stderr and "0.5000 [" in ran.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]


def test_every_benchmark_composes(capsys):
    import hydra

    from pipelines import launch
    from proxytune.evaluation.benchmarks import catalog
    from proxytune.files import resource

    for name in catalog.names():
        with hydra.initialize_config_dir(str(resource("conf")), job_name="score", version_base="1.3"):
            values = launch.plain(hydra.compose("score", [f"benchmark={name}", "predictions=x"]), "score", None)
        assert load(Score, values).benchmark == Benchmark(name=name)
        assert set(values) == set(Score.model_fields)
        assert set(values["benchmark"]) == set(Benchmark.model_fields)


def test_rows_are_kept_where_asked(tmp_path, capsys):
    run(written(tmp_path / "p.jsonl", *GSM), out=tmp_path / "scored.jsonl")
    kept = read_jsonl(tmp_path / "scored.jsonl")
    assert kept[1] == {
        "id": "b?", "outputs": ["It is 1200 "], "verdicts": [{"exact_match": 1.0, "parsed": True}]
    }  # fmt: skip
    assert [row["verdicts"][0]["parsed"] for row in kept] == [True, True, False, True]


# Which columns, and which reference


def test_trimmed_outputs_are_taken_as_they_are(tmp_path):
    path = written(tmp_path / "p.jsonl", {"answer": "3", "model_output": "It is 1200 Question: what is 3?"})
    assert run(path)["exact_match"] == 0 and run(path, outputs="trimmed")["exact_match"] == 1


def test_columns_of_any_name_are_taken_where_they_are_named(tmp_path):
    path = written(tmp_path / "p.jsonl", {"reply": "18", "gold": 18, "model_output": "0"}, {"reply": "1", "gold": 2})
    assert run(path, fields={"output": "reply", "reference": "gold"})["exact_match"] == 0.5


def test_columns_of_the_common_names_are_found(tmp_path):
    for name in ("response", "generation", "outputs", "prediction"):
        path = written(tmp_path / "p.jsonl", {name: "18", "answer": 18}, {name: "1", "answer": "2"})
        assert run(path)["exact_match"] == 0.5
    released = {"answer": "18", "model_output": "So 18.", "prediction": "no"}
    assert run(written(tmp_path / "p.jsonl", released))["exact_match"] == 1


def test_all_of_gsm8k_s_own_solutions_are_right_in_any_order_and_by_any_name(tmp_path):
    rows = PUBLIC / "gsm8k" / "test.jsonl"
    if not rows.exists():
        pytest.skip("GSM8K's test rows are not here")
    known = read_jsonl(rows)
    given = [{"id": i, "question": row["question"], "output": row["answer"]} for i, row in enumerate(known)][::-1]
    for drop in ((), ("id",), ("question",)):
        path = written(tmp_path / "p.jsonl", *({k: v for k, v in one.items() if k not in drop} for one in given))
        found = run(path, rows=rows, bootstrap_samples=10)
        assert (found["exact_match"], found["n"], found["unparsed"]) == (1, 1319, 0)


def test_references_are_joined_by_order_by_id_and_by_question(tmp_path, capsys):
    rows = written(tmp_path / "test.jsonl", *({"question": f"q{i}?", "answer": f"#### {i}"} for i in range(4)))
    by_order = [{"output": str(i)} for i in (0, 1, 2, 9)]
    assert run(written(tmp_path / "a.jsonl", *by_order), rows=rows)["exact_match"] == 0.75
    by_id = [{"output": "3", "key": "test-3"}, {"output": "0", "key": "test-2"}]
    found = run(written(tmp_path / "b.jsonl", *by_id), rows=rows, fields={"id": "key"})
    assert (found["exact_match"], found["n"]) == (0.5, 2)
    assert "2 of 4 rows have no output" in capsys.readouterr().err
    by_question = [{"output": "2", "question": "q2?"}]
    assert run(written(tmp_path / "c.jsonl", *by_question), rows=rows)["exact_match"] == 1
    assert run(written(tmp_path / "d.jsonl", *by_order[:2]), rows=rows, limit=2)["exact_match"] == 1


def test_ids_that_say_another_order_are_never_joined_by_order(tmp_path):
    rows = written(tmp_path / "test.jsonl", *({"question": f"q{i}? ", "answer": f"#### {i}"} for i in range(4)))

    def scored(*names):
        lines = [{"question": name, "output": name[1]} for name in names]
        return run(written(tmp_path / "p.jsonl", *lines), rows=rows)["exact_match"]

    assert scored("q3?", "q1?", "q0?", "q2?") == 1  # spaces at the ends of a name say nothing
    assert scored("q0?", "q1 changed?", "q2?", "q3?") == 1  # as good as in the rows' order
    with pytest.raises(DataError, match="line 2: no row is called 'q1 changed"):
        scored("q3?", "q1 changed?", "q0?", "q2?")
    from_one = [{"id": i + 1, "output": str(i)} for i in range(4)]
    assert run(written(tmp_path / "p.jsonl", *from_one), rows=rows)["exact_match"] == 1


def test_rows_without_an_output_are_counted(tmp_path):
    rows = written(tmp_path / "test.jsonl", *({"question": f"q{i}?", "answer": f"#### {i}"} for i in range(4)))
    path = written(tmp_path / "p.jsonl", {"question": "q2?", "output": "2"})
    assert run(path, rows=rows)["missing"] == 3 and "missing" not in run(written(path, *GSM))


def test_an_output_that_is_null_is_an_empty_one(tmp_path):
    found = run(written(tmp_path / "p.jsonl", {"answer": "1", "output": "1"}, {"answer": "1", "output": None}))
    assert (found["exact_match"], found["unparsed"]) == (0.5, 1)
    verdicts = {"Question": "q", "output": None, "GPT-true acc": 1, "GPT-info acc": 0}
    assert run(written(tmp_path / "p.jsonl", verdicts), "truthfulqa_open")["true"] == 1


def test_an_output_with_half_a_character_can_be_kept(tmp_path):
    path = written(tmp_path / "p.jsonl", '{"answer": "1", "output": "\\ud83d 1"}')
    assert run(path, out=tmp_path / "o.jsonl")["exact_match"] == 1
    assert read_jsonl(tmp_path / "o.jsonl")[0]["outputs"] == ["\ufffd 1"]


def test_a_join_that_cannot_be_made_is_refused(tmp_path):
    rows = written(tmp_path / "test.jsonl", *({"question": f"q{i}?", "answer": f"#### {i}"} for i in range(4)))
    with pytest.raises(DataError, match=r"has 3 rows for 4 of gsm8k, and no id"):
        run(written(tmp_path / "a.jsonl", *[{"output": "1"}] * 3), rows=rows)
    with pytest.raises(DataError, match=r"line 2: no row is called 'test-9'"):
        lines = [{"output": "1", "id": name} for name in ("test-1", "test-9")]
        run(written(tmp_path / "b.jsonl", *lines), rows=rows)
    with pytest.raises(DataError, match=r"answers 'test-1' more than once"):
        run(written(tmp_path / "c.jsonl", *[{"output": "1", "id": "test-1"}] * 2), rows=rows)
    with pytest.raises(SettingsError, match=r"both fields\.reference and benchmark.rows"):
        run(written(tmp_path / "d.jsonl", *GSM), rows=rows, fields={"reference": "answer"})


@pytest.mark.parametrize(
    ("lines", "fields", "said"),
    [
        ([*GSM, "{"], {}, "line 5: not JSON"),
        ([GSM[0], {"answer": "1"}], {}, "a bad row: line 2: there is no 'model_output'"),
        ([GSM[0], GSM[0] | {"model_output": 3}], {}, "line 2: 'model_output' is no text"),
        ([GSM[0] | {"answer": "many"}], {}, "line 1: 'answer': 'many' is no number"),
        ([GSM[0], *["[]"] * 5], {}, "5 bad rows: line 2: not an object but list; line 3"),
        ([{"x": 1}], {}, "no column with outputs (there are: x) (name it with fields.output=)"),
        (GSM, {"output": "model_ouput"}, "no 'model_ouput' (did you mean 'model_output'?)"),
        ([], {}, "holds no rows"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_by_line_number(lines, fields, said, tmp_path):
    with pytest.raises(DataError) as error:
        run(written(tmp_path / "p.jsonl", *lines), fields=fields)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_without_predictions_there_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["score"]) == 2
    assert capsys.readouterr().err == "proxytune: there is nothing to score (set predictions=FILE)\n"


def test_what_has_no_outputs_cannot_be_scored(tmp_path):
    from proxytune.evaluation.benchmarks import catalog, weighed

    assert {*catalog.WEIGHED} == {*weighed.KINDS, "heldout_loss"}
    for name in catalog.WEIGHED:
        with pytest.raises(SettingsError, match=f"use proxytune evaluate benchmark={name}"):
            run(written(tmp_path / "p.jsonl", *GSM), name)


# Released forms


def test_multiple_choice_is_joined_with_the_real_csv(tmp_path):
    csv = PUBLIC / "truthfulqa" / "TruthfulQA.csv"
    if not csv.exists():
        pytest.skip("TruthfulQA.csv is not here")
    letters = "CCDCCCBADDA"  # of the first questions, as released
    path = written(tmp_path / "p.jsonl", *({"mc_output": f" {letter}"} for letter in letters))
    assert run(path, "truthfulqa_mc", rows=csv, limit=len(letters))["accuracy"] == 1


@pytest.mark.parametrize("changes", [{"id": "\ud800"}, {"target_groups": ["\ud800"]}], ids=["id", "group"])
def test_an_id_or_group_of_half_a_character_is_refused_by_its_line(tmp_path, changes):
    row = {"id": "1", "text": "- x", "target_groups": ["women"], "prediction": "y", "is_toxic": 1}
    with pytest.raises(DataError, match="line 2: its id or group holds half a character"):
        run(written(tmp_path / "t.jsonl", row, row | changes), "toxigen")


def test_verdicts_that_a_file_tells_are_taken_and_that_is_said(tmp_path, capsys):
    rows = [
        {"text": "- x", "target_groups": [group], "prediction": "y", "is_toxic": flag}
        for group, flag in (("asian", 1), ("asian", 0), ("women", 0))
    ]
    found = run(written(tmp_path / "t.jsonl", *rows), "toxigen")
    assert found["toxic"] == 1 / 3 and found["by_group"]["asian"]["toxic"] == 0.5
    assert "verdicts are the file's own (is_toxic)" in capsys.readouterr().err

    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps([{"output_2": "b", "preference": p} for p in (2, 1.5, 1, None)]))
    found = run(annotations, "alpaca_farm")
    assert (found["win_rate"], found["unparsed"], found["n_draws"]) == (0.5, 1, 1)
    found = run(annotations, "alpaca_farm", fields={"verdict": "preference"})
    assert found["win_rate"] == 0.5

    lines = [{"Question": "q", "output": "a", "GPT-true acc": t, "GPT-info acc": i} for t, i in ((1, 1), (0, 1))]
    assert run(written(tmp_path / "o.jsonl", *lines), "truthfulqa_open")["info_true"] == 0.5

    lines = [{"task_id": "HumanEval/0", "completion": "x", "passed": i < 3} for i in range(10)]
    found = run(written(tmp_path / "h.jsonl", *lines), "humaneval")
    assert (found["n"], found["outputs"], found["pass@10"]) == (1, 10, 1.0)
    assert found["pass@1"] == pytest.approx(0.3)


def test_verdicts_of_code_may_be_spelled_out_listed_or_lacking(tmp_path):
    def passed(*lines, **fields):
        return run(written(tmp_path / "p.jsonl", *lines), "humaneval", fields=fields)

    told = ["True", "False", "passed", "failed: no", "timed out", 1, 0.0, None]
    found = passed(*({"task_id": "HumanEval/0", "completion": "x", "result": one} for one in told), verdict=["result"])
    assert (found["pass@1"], found["outputs"], found["unparsed"]) == (pytest.approx(3 / 8), 8, 1)
    listed = {"task_id": "HumanEval/0", "completion": ["x"] * 10, "passed": [True] + [False] * 9}
    found = passed(listed)
    assert (found["pass@1"], found["pass@10"], found["outputs"]) == (pytest.approx(0.1), 1, 10)
    with pytest.raises(DataError, match="line 1: 1 verdicts for 10 outputs"):
        passed(listed | {"passed": True})
    with pytest.raises(DataError, match="line 1: 'maybe' is no verdict"):
        passed({"task_id": "HumanEval/0", "completion": "x", "passed": "maybe"})


def test_a_judge_of_preferences_must_be_named(tmp_path):
    rows = written(tmp_path / "farm.jsonl", {"instruction": "Sing.", "output": "La."})
    with pytest.raises(SettingsError, match=r"set benchmark\.judge\.url"):
        run(written(tmp_path / "p.jsonl", {"instruction": "Sing.", "output": "Lala."}), "alpaca_farm", rows=rows)


def test_alpaca_farm_is_judged_over_http_and_what_it_took_is_told(tmp_path, monkeypatch):
    api = Api()
    serving = threading.Thread(target=api.server.serve_forever, args=(0.02,))
    serving.start()
    api.faults = [503, 400]
    rows = written(tmp_path / "f.jsonl", *({"instruction": f"Sing {i}.", "output": "La" * i} for i in range(1, 5)))
    path = written(tmp_path / "p.jsonl", *({"instruction": f"Sing {i}.", "output": "LaLa"} for i in range(1, 5)))
    judge = Judge(url=api.url, models={"preference": "mine"}, kept=tmp_path / "kept", concurrency=1)
    try:
        found = run(path, "alpaca_farm", rows=rows, judge=judge)
        again = run(path, "alpaca_farm", rows=rows, judge=judge)
    finally:
        api.server.shutdown()
        api.server.server_close()
        serving.join()
    assert (found["unparsed"], found["unjudged"], found["judges"]) == (1, 1, {"preference": "mine"})
    # Of four one failed; of the rest, as long as the reference is a draw, and longer loses to this judge's taste.
    assert found["win_rate"] == pytest.approx((0.5 + 0 + 0) / 3) and found["n_draws"] == 1
    assert found["prompt_tokens"] == 7 * found["requests"] == 7 * 6  # one pair is equal both ways round
    assert (again["unparsed"], again["kept"], again["requests"]) == (0, 7, 1)


@pytest.mark.parametrize("fault", [503, None])
def test_a_judge_that_gives_no_verdict_at_all_is_one_line(tmp_path, fault):
    rows = written(tmp_path / "f.jsonl", {"instruction": "Sing.", "output": "La."})
    path = written(tmp_path / "p.jsonl", {"instruction": "Sing.", "output": "LaLa."})
    with Api() as api:
        api.faults, api.choose = [fault] * 2 if fault else [], lambda *_: "I cannot say"
        judge = Judge(url=api.url, models={"preference": "mine"}, kept=tmp_path / "kept", retries=0)
        with pytest.raises(ModelError, match=r"judged none of 1 outputs: 2 answers .*mine runs there"):
            run(path, "alpaca_farm", rows=rows, judge=judge)


# Code


@pytest.fixture(scope="module")
def problems():
    path = PUBLIC / "humaneval" / "HumanEval.jsonl.gz"
    if not path.exists():
        pytest.skip("HumanEval.jsonl.gz is not here")
    return path, [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_code_is_not_run_unless_that_is_allowed(problems, tmp_path):
    path, rows = problems
    mark = tmp_path / "ran"
    line = {"task_id": rows[0]["task_id"], "completion": f"    open({str(mark)!r}, 'w')\n"}
    with pytest.raises(SettingsError, match=r"benchmark\.allow_code=true runs them in a sandbox"):
        run(written(tmp_path / "p.jsonl", line), "humaneval", rows=path)
    assert not mark.exists()


def test_humaneval_s_own_solutions_pass_and_others_do_not(problems, tmp_path, capsys):
    path, rows = problems
    lines = []
    for row in rows[:12]:
        for completion in (row["canonical_solution"], "    return None\n"):
            lines.append({"task_id": row["task_id"], "completion": completion})
    file = written(tmp_path / "p.jsonl", *lines)
    with isolation.or_skip():
        found = run(file, "humaneval", rows=path, allow_code=True, outputs="trimmed", workers=2)
    assert (found["n"], found["outputs"], found["pass@1"]) == (12, 24, 0.5)
    assert found["sandbox"] == "isolated" and found["ended"] == {"passed": 12, "failed": 12}


def test_samples_may_stand_in_one_line(problems, tmp_path):
    path, rows = problems
    several = [rows[0]["canonical_solution"], "    return None", rows[0]["canonical_solution"]]
    file = written(tmp_path / "p.jsonl", {"task_id": rows[0]["task_id"], "output": several})
    with isolation.or_skip():
        found = run(file, "humaneval", rows=path, allow_code=True, outputs="trimmed", workers=1)
    assert found["pass@1"] == pytest.approx(2 / 3) and found["outputs"] == 3


def test_ds1000_is_scored_by_library(tmp_path):
    context = "def test_execution(code):\n    env = {}\n    exec(code, env)\n    assert env['x'] == 3\n"
    rows = [
        {
            "prompt": "x",
            "code_context": context,
            "metadata": {"library": library, "library_problem_id": i, "problem_id": p},
        }
        for p, (library, i) in enumerate([("Pandas", 0), ("Pandas", 1), ("Numpy", 0)])
    ]
    path = tmp_path / "ds1000.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    lines = [
        {"lib": "Pandas", "problem_id": 0, "output": ["x = 3", "x = 4"]},
        {"lib": "Pandas", "problem_id": 1, "output": ["x = 5", "x = 4"]},
        {"lib": "Numpy", "problem_id": 0, "output": ["x = 1 + 2\n</code> so", "```python\nx = 3\n```"]},
    ]
    with isolation.or_skip():
        found = run(written(tmp_path / "p.jsonl", *lines), "ds1000", rows=path, allow_code=True, workers=1)
    by_library = {name: part["pass@1"] for name, part in found["by_library"].items()}
    assert found["pass@1"] == 0.5 and by_library == {"Pandas": 0.25, "Numpy": 1.0}
    by_id = written(tmp_path / "q.jsonl", {"id": 2, "code": "x = 3"})
    assert run(by_id, "ds1000", rows=path, allow_code=True, workers=1)["pass@1"] == 1
