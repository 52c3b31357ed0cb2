"""Judges of what no rule can score: a language model behind an API, or a released model run here.

The API is OpenAI's chat completions, which many servers speak. Each pair of replies is shown in both orders; a judge
that prefers the same reply twice decides for it, one that changes its mind calls a draw. Every answer is kept as soon
as it comes, so a run that was stopped pays for nothing twice. The question is in our own words: win rates of different
judges, or of other words, are not to be compared; `benchmark.judge.template` puts another question.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from proxytune import settings
from proxytune.errors import ModelError, SettingsError, StorageError, did_you_mean
from proxytune.files import Journal, hash_json
from proxytune.tracking.progress import track

QUESTION = """\
Two replies to the same instruction follow. Say which one a careful human reader would rather have received.

Instruction:
{instruction}

Reply A:
{output_1}

Reply B:
{output_2}

Answer with a single letter and nothing else: A if reply A is better, B if reply B is better, C if neither is.
"""
PREFERENCES = {"A": 1.0, "B": 2.0, "C": 1.5}
ASKING = {"temperature": 0, "max_tokens": 16}
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # worth another try
NO_REPLY = (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError)  # none, cut, or of another form
REFUSALS = {
    401: "the key is refused",
    403: "the key is refused",
    404: "there is no such model or address",
}
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before another try; doubled each time


@dataclass(frozen=True)
class Pair:
    instruction: str
    reference: str
    output: str

    def orders(self) -> tuple[tuple[str, str], tuple[str, str]]:
        return (self.reference, self.output), (self.output, self.reference)


class Unanswered(Exception):
    """A request that failed for good; the others may not."""


def named(own: Mapping[str, str], asked: Mapping[str, str]) -> dict[str, str]:
    """The judges' models, by what they judge: the benchmark's own, or those that the user names instead."""
    for name in asked:
        if name not in own:
            raise SettingsError(f"benchmark.judge.models.{name} judges nothing here", did_you_mean(name, own))
    return {**own, **asked}


def prefer(pairs: Sequence[Pair], model: str, chosen: settings.Judge) -> tuple[list[float | None], dict[str, Any]]:
    """(preference for each pair's output in 1..2, None where there is none; what it took).

    Raises SettingsError without an address, ModelError where the API refuses all requests alike.
    """
    if chosen.url is None:
        raise SettingsError(
            "a language model has to judge these", "set benchmark.judge.url, or score a file with verdicts"
        )
    judge = Judge(model, chosen)
    asked = [(pair.instruction, *order) for pair in pairs for order in pair.orders()]
    pool = ThreadPoolExecutor(chosen.concurrency)
    try:
        answers = list(track(pool.map(judge.answer, asked), f"judged by {model}", len(asked)))
    finally:
        pool.shutdown(cancel_futures=True)
    preferences = [_agreed(first, second) for first, second in zip(answers[::2], answers[1::2], strict=True)]
    return preferences, judge.cost | {"unjudged": preferences.count(None)}


def _agreed(first: float | None, second: float | None) -> float | None:
    """The mean of both orders' preferences for the output, which stood second and then first."""
    return None if first is None or second is None else (first + 3 - second) / 2


class Judge:
    """One model behind an API, with the answers that it has given before.

    asking: fields of each request beside the model and the question, such as a temperature.
    """

    def __init__(self, model: str, chosen: settings.Judge, asking: Mapping[str, Any] = ASKING):
        self.model, self.chosen, self.asking = model, chosen, asking
        self.template = template(chosen.template, QUESTION, ("instruction", "output_1", "output_2"))
        self.key = os.environ.get(chosen.key, "").strip()
        self.lock = threading.Lock()
        self.journal = _journal(chosen.kept / (re.sub(r"[^\w.-]", "_", model) + ".jsonl"))
        self.known = {row.get("name"): row.get("answer") for row in self.journal.rows}
        self.cost = dict.fromkeys(("requests", "kept", "failures", "prompt_tokens", "completion_tokens"), 0)

    def answer(self, asked: tuple[str, str, str]) -> float | None:
        """Which of two replies is preferred: 1 the first, 2 the second, 1.5 neither; None if that cannot be had."""
        said = self.said(filled(self.template, dict(zip(("instruction", "output_1", "output_2"), asked, strict=True))))
        preference = None if said is None else _parsed(said)
        if said is not None and preference is None:
            with self.lock:
                self._count(failures=1)
        return preference

    def said(self, question: str, sample: int = 0) -> str | None:
        """The model's words; None if they cannot be had. sample: which of several answers to the same question."""
        more = [] if self.asking == ASKING else [self.asking, sample]
        name = hash_json([self.model, self.chosen.url, question, *more])
        with self.lock:
            known = self.known.get(name)
            self._count(kept=known is not None)
        if known is not None:
            return known
        try:
            text, tokens = self._post(question)
        except Unanswered:
            with self.lock:
                self._count(failures=1)
            return None
        with self.lock:
            self._count(requests=1, **tokens)
            self.known[name] = text
            self.journal.append({"name": name, "model": self.model, "answer": text, **tokens})
        return text

    def _count(self, **more: int) -> None:
        for name, count in more.items():
            self.cost[name] += count

    def _post(self, question: str) -> tuple[str, dict[str, int]]:
        """(the model's words, tokens that they took), after as many tries as allowed."""
        wait = FIRST_WAIT
        for left in reversed(range(self.chosen.retries + 1)):
            try:
                return self._once(question)
            except urllib.error.HTTPError as error:
                if error.code in REFUSALS:
                    raise self._refused(error) from error
                if error.code not in PASSING or not left:
                    raise Unanswered from error
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except NO_REPLY as error:
                if not left:
                    raise Unanswered from error
            time.sleep(min(wait, LONGEST_WAIT))
            wait *= 2
        raise Unanswered

    def _once(self, question: str) -> tuple[str, dict[str, int]]:
        messages = [{"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, **self.asking}
        request = urllib.request.Request(
            f"{str(self.chosen.url).rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "User-Agent": "proxytune"},
        )
        if self.key:  # never sent on to where the server may redirect
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        with urllib.request.urlopen(request, timeout=self.chosen.timeout) as answered:
            reply = json.loads(answered.read())
        text, usage = reply["choices"][0]["message"]["content"], reply.get("usage") or {}
        tokens = {key: int(usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens")}
        return str(text or "").encode(errors="replace").decode(), tokens  # half characters could not be written down

    def _refused(self, error: urllib.error.HTTPError) -> ModelError:
        hint = f"its key is read from the environment's {self.chosen.key}"
        return ModelError(f"{self.chosen.url} refuses {self.model}: {REFUSALS[error.code]} (HTTP {error.code})", hint)


def template(path: Path | None, own: str, names: Sequence[str]) -> str:
    """A question to a judge: `own`, or a file's, which must have every one of `names` in braces."""
    if path is None:
        return own
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the judge's template {path} cannot be read: {error}") from error
    missing = [f"{{{name}}}" for name in names if f"{{{name}}}" not in text]
    if missing:
        raise SettingsError(f"{path} lacks {', '.join(missing)}", "a judge must see what it judges")
    return text


def filled(template: str, values: Mapping[str, str]) -> str:
    """All names replaced at once: a reply that holds a brace, or another's name, stays as it is."""
    return re.sub(rf"\{{({'|'.join(values)})\}}", lambda match: values[match[1]], template)


def _parsed(answer: str) -> float | None:
    found = re.match(r"\W*(?:reply\s+)?([ABC])\b", answer, flags=re.IGNORECASE)
    return PREFERENCES[found[1].upper()] if found else None


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0


def _journal(path: Path) -> Journal:
    """The answers that a model gave before."""
    try:
        return Journal(path, old=True)
    except StorageError as error:
        raise StorageError(error.what, "remove that line: what it answered is asked again") from error


def classify(model: str, texts: Sequence[str], positive: int | str, batch_size: int) -> list[float]:
    """1 or 0 for each text: whether a classifier's label, or the next word of a judge, is the positive one.

    positive: a label's index, or the next word with its leading space, which counts from a probability of one half.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    kind = AutoModelForSequenceClassification if isinstance(positive, int) else AutoModelForCausalLM
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        judge: Any = kind.from_pretrained(model, dtype="auto", trust_remote_code=False)  # some are released as .bin
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the judge {model} cannot be loaded: {str(error)[:200]}", "name another with benchmark.judge.models"
        ) from error
    judge.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    cut = isinstance(positive, int)
    longest = min(tokenizer.model_max_length, judge.config.max_position_embeddings - 2) if cut else None
    found: list[float] = []
    starts = range(0, len(texts), batch_size)
    with torch.no_grad():
        for start in track(starts, f"judged by {model}", len(starts)):
            batch = list(texts[start : start + batch_size])
            inputs = tokenizer(batch, padding=True, truncation=cut, max_length=longest, return_tensors="pt")
            logits = judge(**inputs.to(judge.device)).logits
            if cut:
                found += (logits.argmax(-1) == positive).float().tolist()
            else:
                found += _next_word(tokenizer, inputs.attention_mask, logits, batch, str(positive))
    return found


def _next_word(tokenizer, mask, logits, texts: Sequence[str], word: str) -> list[float]:
    """Whether the word's first token has at least half of the probability after each text."""
    last = mask.sum(-1) - 1
    after = logits[range(len(texts)), last].float().softmax(-1)
    found = []
    for row, text in enumerate(texts):
        before, whole = tokenizer(text).input_ids, tokenizer(text + word).input_ids
        first = next(
            (b for a, b in zip(before, whole, strict=False) if a != b), whole[min(len(before), len(whole) - 1)]
        )
        found.append(float(after[row, first] >= 0.5))
    return found
