"""Verdicts on outputs, by whatever judges a benchmark: a rule, a program's tests, a classifier, or a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxytune import settings
from proxytune.errors import ModelError, SettingsError
from proxytune.evaluation.benchmarks.benchmark import Benchmark, Classifier, Preference, Program, Rule, Verdict

Asked = Sequence[tuple[Any, Sequence[str]]]  # of each row its reference and the outputs, one a sample
Judged = tuple[list[list[Verdict]], dict[str, Any]]


def judge(benchmark: Benchmark, asked: Asked, chosen: settings.Benchmark) -> Judged:
    """(verdicts of each row, what is told of the judging). Outputs are trimmed already.

    Raises SettingsError where code may not be run or no judge is named, ModelError where a judge gives no verdict.
    """
    match benchmark.judge:
        case Rule(verdict):
            return [[verdict(reference, output) for output in outputs] for reference, outputs in asked], {}
        case Program():
            return _run(benchmark.judge, asked, chosen)
        case Classifier():
            return _classify(benchmark.judge, asked, chosen.judge)
        case Preference():
            return _prefer(benchmark.judge, asked, chosen.judge)


def worth_keeping(benchmark: Benchmark) -> bool:
    """Whether verdicts cost time; a judge behind an API keeps its own answers, and what failed is asked again."""
    return isinstance(benchmark.judge, (Program, Classifier))


def content(chosen: settings.Benchmark) -> dict[str, Any]:
    """What verdicts depend on, beside outputs and references."""
    asked = chosen.model_dump(mode="json", include={"sandbox", "python", "cpu_seconds"})
    return asked | {"judge": chosen.judge.model_dump(mode="json", include={"models", "url", "template"})}


def refuse_code(benchmark: Benchmark, chosen: settings.Benchmark) -> None:
    """Nothing is run that the user did not allow to run."""
    if isinstance(benchmark.judge, Program) and not chosen.allow_code:
        raise SettingsError(
            f"{benchmark.name} runs programs that a model wrote", "benchmark.allow_code=true runs them in a sandbox"
        )


def _run(program: Program, asked: Asked, chosen: settings.Benchmark) -> Judged:
    from collections import Counter

    from proxytune.evaluation import sandbox

    limits = sandbox.Limits(
        cpu_seconds=chosen.cpu_seconds or program.cpu_seconds,
        memory=program.memory,
        disk=program.disk,
        processes=program.processes,
    )
    box = sandbox.Box(limits, chosen.sandbox, chosen.python, program.preload)
    programs = [program.compose(reference, output) for reference, outputs in asked for output in outputs]
    results = sandbox.run(programs, box, chosen.workers)
    found = iter(Verdict({"passed": float(result.status == "passed")}) for result in results)
    told = {"sandbox": chosen.sandbox, "ended": dict(Counter(result.status for result in results))}
    return _regrouped(found, asked), told


def _classify(classifier: Classifier, asked: Asked, chosen: settings.Judge) -> Judged:
    from proxytune.evaluation import judges

    models = judges.named(classifier.models, chosen.models)
    questions = [(str(reference), output) for reference, outputs in asked for output in outputs]
    values = {
        value: judges.classify(
            model,
            [classifier.asks(value, question, output) for question, output in questions],
            classifier.positive,
            chosen.batch_size,
        )
        for value, model in models.items()
    }
    found = iter(Verdict({value: scores[i] for value, scores in values.items()}) for i in range(len(questions)))
    return _regrouped(found, asked), {"judges": models}


def _prefer(preference: Preference, asked: Asked, chosen: settings.Judge) -> Judged:
    from proxytune.evaluation import judges

    (model,) = judges.named({"preference": preference.model}, chosen.models).values()
    pairs = [
        judges.Pair(reference["instruction"], reference["output"], output)
        for reference, outputs in asked
        for output in outputs
    ]
    preferences, told = judges.prefer(pairs, model, chosen)
    if told["unjudged"] == len(pairs):
        what = f"{chosen.url} judged none of {len(pairs)} outputs: {told['failures']} answers are missing or no verdict"
        raise ModelError(what, f"see whether {model} runs there, and give the same command again: answers are kept")
    verdicts = (
        Verdict({}, parsed=False) if preference is None else Verdict({"win_rate": preference - 1})
        for preference in preferences
    )
    return _regrouped(iter(verdicts), asked), {"judges": {"preference": model}} | told


def _regrouped(found: Any, asked: Asked) -> list[list[Verdict]]:
    return [[next(found) for _ in outputs] for _, outputs in asked]


def recorded(rows: Sequence[Sequence[Verdict]], columns: Sequence[str]) -> Judged:
    """Verdicts that a file told, in the same form."""
    return [list(row) for row in rows], {"recorded": list(columns)}


def trimmed(benchmark: Benchmark, outputs: Sequence[str], raw: bool) -> list[str]:
    return [benchmark.trim(output) if raw else output for output in outputs]


def record(id: str, outputs: Sequence[str], verdicts: Sequence[Verdict], groups: Mapping[str, str]) -> dict[str, Any]:
    """One row's outputs and verdicts, for a file of them."""
    told = [{**verdict.values, "parsed": verdict.parsed} for verdict in verdicts]
    return {"id": id, **groups, "outputs": list(outputs), "verdicts": told}
