"""Loss and metric of base, expert, steered and tuned on held-out rows, with paired intervals.

  proxytune evaluate expert=code@latest
  proxytune evaluate expert=code@best split=test
  proxytune evaluate -m alpha=0,0.25,0.5,1         one table and one curve over all the alphas
  proxytune evaluate -m alpha=0,1 hydra/launcher=joblib
  proxytune evaluate benchmark=gsm8k benchmark.rows=test.jsonl alphas=[0,0.5,1]
  proxytune evaluate benchmark=truthfulqa_likelihood benchmark.rows=mc_task.json
  proxytune evaluate harness=arc_easy,hellaswag lm_eval.limit=500

Points that are done are not computed again.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from typing import Any

from pipelines import cli, named


def run(values: dict[str, Any]) -> None:
    from proxytune.settings import Evaluate

    settings = named.load(Evaluate, values)

    from proxytune.stages import evaluate

    evaluate.run(settings)


def gather(jobs: list[dict[str, Any]]) -> None:
    """Sum up a multirun: one table and one curve for jobs that differ in nothing but alpha."""
    from proxytune.settings import Evaluate, load
    from proxytune.stages import evaluate, sweep

    curves: dict[str, set[float]] = defaultdict(set)
    for values in jobs:
        alpha = values.pop("alpha")
        if alpha is not None:
            curves[json.dumps(values, sort_keys=True)].add(float(alpha))
    for rest, alphas in curves.items():
        settings = load(Evaluate, json.loads(rest))
        if len(alphas) > 1 and (settings.benchmark is not None or settings.harness):
            evaluate.run(settings.model_copy(update={"alphas": sorted(alphas)}))
        elif len(alphas) > 1:
            sweep.collect(settings, sorted(alphas))


if __name__ == "__main__":
    sys.exit(cli.main(["evaluate", *sys.argv[1:]]))
