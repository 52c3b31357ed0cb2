"""A benchmark that is written: every system's outputs to its questions, made once, kept, and judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from proxytune import settings
from proxytune.decoding.request import Limits, Request, sampling
from proxytune.evaluation.benchmarks import verdicts
from proxytune.evaluation.benchmarks.benchmark import Benchmark, Decoding, Row, decoding
from proxytune.evaluation.benchmarks.scored import Scored
from proxytune.evaluation.points import Filed, certificate, certificates
from proxytune.evaluation.summary import digest
from proxytune.evaluation.system import System
from proxytune.files import Journal, hash_json, read_checked, write_checked
from proxytune.tracking.progress import track

VERSION = 1  # raise when the same settings give other outputs
TOO_LONG = "too long"  # the finish reason of a question that does not fit into a model's context


@dataclass(frozen=True)
class Written(Filed):
    """A benchmark's questions, and how outputs are decoded and judged.

    A record of a point holds id, outputs (raw, one a sample) and their finish_reasons.
    """

    benchmark: Benchmark
    chosen: settings.Benchmark
    rows: Sequence[Row]
    decode: settings.Decode
    dtype: str

    @property
    def name(self) -> str:
        return self.benchmark.name

    @cached_property
    def decoding(self) -> Decoding:
        return decoding(self.benchmark, self.chosen)

    @property
    def at_once(self) -> int:
        return self.decode.batch_size

    def at_most(self, rows: int) -> Written:
        return replace(self, decode=self.decode.at_most(rows))

    @cached_property
    def sampled(self) -> settings.Decode:
        """What the benchmark leaves open is as the settings say."""
        own = {"temperature": self.decoding.temperature, "top_p": self.decoding.top_p}
        return self.decode.model_copy(update=own | {"max_new_tokens": self.decoding.max_new_tokens})

    @cached_property
    def content(self) -> dict[str, Any]:
        """All that outputs depend on, but for the models."""
        return {
            "version": VERSION,
            "benchmark": self.name,
            "rows": hash_json([[row.id, asdict(row.prompt)] for row in self.rows]),
            "decoding": asdict(self.decoding),
            "decode": self.sampled.content(),
            "dtype": self.dtype,
        }

    def compute(self, system: System, alphas: Sequence[Sequence[float]], parts: Sequence[Path]) -> list[list[dict]]:
        """The records of all alphas. parts: of each alpha the file that keeps outputs as they are written."""
        samples, journals = self.decoding.samples, [Journal(part) for part in parts]
        done = {(a, i["row"], i["sample"]): i for a, journal in enumerate(journals) for i in journal.rows}
        asked = [system.encode(row.prompt) for row in self.rows]
        engine = system.engine(self.sampled)
        limits = self._limits(system)
        places, requests = [], []
        for i, prompts in enumerate(asked):
            fits = engine.longest is None or max(map(len, prompts.values())) < engine.longest
            for a, its in enumerate(alphas):
                for k in range(samples):
                    if not fits:
                        done[a, i, k] = {"output": "", "finish_reason": TOO_LONG}
                    elif (a, i, k) not in done:
                        places.append((a, i, k))
                        requests.append(Request(prompts, limits, tuple(its), sampling(self.sampled, i * samples + k)))
        for number, reply in track(engine.run(requests), f"{system.name}: outputs", len(requests)):
            a, i, k = places[number]
            done[a, i, k] = {"row": i, "sample": k, "output": reply.text, "finish_reason": reply.finish_reason}
            done[a, i, k] |= certificate(reply)
            journals[a].append(done[a, i, k])
        return [
            [
                {"id": row.id}
                | {f"{key}s": [done[a, i, k][key] for k in range(samples)] for key in ("output", "finish_reason")}
                | certificates([done[a, i, k] for k in range(samples)])
                for i, row in enumerate(self.rows)
            ]
            for a in range(len(alphas))
        ]

    def _limits(self, system: System) -> Limits:
        return Limits(
            self.decoding.max_new_tokens,
            system.end_ids,
            self.decoding.stop,
            self.decode.min_new_tokens,
            spelled(self.decoding.banned, system.tokenizer, system.mixture.vocabulary.size),
        )

    def score(self, records: Sequence[Mapping[str, Any]], path: Path) -> Scored:
        """The records judged. Verdicts that took programs or judges are kept in a file beside `path`."""
        trimmed = [verdicts.trimmed(self.benchmark, record["outputs"], raw=True) for record in records]
        asked = [(row.reference, outputs) for row, outputs in zip(self.rows, trimmed, strict=True)]
        judged, told = self._judged(asked, path)
        flat = [verdict for row in judged for verdict in row]
        too_long = sum(reason == TOO_LONG for record in records for reason in record["finish_reasons"])
        counts = {"outputs": len(flat), "unparsed": sum(not verdict.parsed for verdict in flat)}
        counts |= {"too_long": too_long} if too_long else {}
        return Scored(
            ids=[row.id for row in self.rows],
            digests=[digest(row.prompt.plain, row.reference) for row in self.rows],
            measures=[self.benchmark.measure(row) for row in judged],
            groups=[row.groups for row in self.rows],
            counts=counts | (self.benchmark.counts(flat) if self.benchmark.counts else {}) | told,
            records=[
                verdicts.record(row.id, outputs, its, row.groups)
                for row, outputs, its in zip(self.rows, trimmed, judged, strict=True)
            ],
        )

    def _judged(self, asked: verdicts.Asked, path: Path) -> verdicts.Judged:
        if not verdicts.worth_keeping(self.benchmark):
            return verdicts.judge(self.benchmark, asked, self.chosen)
        kept = path.with_suffix(f".{hash_json(['checked', repr(asked), verdicts.content(self.chosen)])[:12]}.verdicts")
        if kept.is_file():
            told, *rows = read_checked(kept)
            return [[verdicts.Verdict(**one) for one in row["verdicts"]] for row in rows], told
        judged, told = verdicts.judge(self.benchmark, asked, self.chosen)
        write_checked(kept, [told, *({"verdicts": [asdict(one) for one in row]} for row in judged)])
        return judged, told


def spelled(texts: Sequence[str], tokenizer, size: int) -> frozenset[int]:
    """The ids that spell one of these texts by themselves, whatever spaces are around it."""
    if not texts:
        return frozenset()
    return frozenset(
        i for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(size)])) if text.strip() in texts
    )
