"""Speed: the engine's features beside plain decoding and the obvious three-model loop, in one interleaved run.

Every contender writes the same number of tokens from the same prompts, turn by turn, so that what else the machine does
falls on all of them alike; a row is the median over the turns, and a ratio is of times in the same turn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from proxytune.decoding.engine import Engine
from proxytune.decoding.mixture import Mixture, Prompts
from proxytune.decoding.request import Limits, Request
from proxytune.decoding.round import Round
from proxytune.decoding.scoring import Given, losses
from proxytune.files import write_json
from proxytune.models.linear import quicken
from proxytune.models.local import LocalSource
from proxytune.models.members import ACTIVE, attach
from proxytune.models.quiet import quiet
from proxytune.models.source import Term
from proxytune.models.vocabulary import Vocabulary
from proxytune.settings import Bench
from proxytune.steering.choice import Sampling
from proxytune.tracking import record
from proxytune.tracking.progress import track

Work = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One thing that is timed; `beside` is the name of what its ratio is to."""

    name: str
    beside: str
    work: Work


def run(settings: Bench) -> dict[str, Any]:
    """Time all contenders, print the table, and write it beside machine, versions and commit."""
    from proxytune.analysis import tables

    if settings.threads:
        torch.set_num_threads(settings.threads)
    mixture, where = trio(settings)
    rows = prompts(settings, mixture, max(16, *settings.batch_sizes))
    given = (settings, mixture, rows)
    contenders = [*batches(*given), *alphas(*given), *mixed(*given), *pair(mixture)]
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    drafted: dict[str, dict[str, float | None]] = {}
    with torch.inference_mode():
        for contender in track(contenders, "warming up", len(contenders)):
            contender.work()
        turns = [contender for _ in range(settings.turns) for contender in contenders]
        for contender in track(turns, "timing", len(turns)):
            synchronise(mixture)
            began = perf_counter()
            used = contender.work()
            synchronise(mixture)
            times[contender.name].append(perf_counter() - began)
            if isinstance(used, Engine) and used.stats.acceptance is not None:
                drafted[contender.name] = {
                    "acceptance": used.stats.acceptance,
                    "tokens_per_round": used.stats.tokens_per_round,
                }
    lines = [
        {
            "name": c.name,
            "seconds": median(times[c.name]),
            "beside": c.beside,
            "ratio": median(b / a for a, b in zip(times[c.name], times[c.beside], strict=True)),
            **drafted.get(c.name, {}),
        }
        for c in contenders
    ]
    found: dict[str, Any] = {"trio": where, "rows": lines, "threads": torch.get_num_threads(), "turns": settings.turns}
    found |= {"torch": torch.__version__, "device": str(mixture.base.source.device), **record.code_version()}
    found["flips"] = flips(*given)
    name = "random" if settings.trio == "random" else settings.family.name
    path = settings.outputs / "bench" / f"{name}-{settings.dtype}.json"
    write_json(path, found)
    tables.console().print(tables.bench(found))
    print(path)
    return found


@torch.inference_mode()
def flips(settings: Bench, mixture: Mixture, rows: Sequence[Prompts], width: int = 5) -> dict[str, int]:
    """At how many positions another token is the likeliest when `width` of them are read at once and not one by one."""
    changed = positions = 0
    for row in rows[:4]:
        likeliest = []
        for step in (1, width):
            scores = {}
            for group in mixture.groups:
                stream = group[0].source.open(1, settings.prompt_tokens, [term.member for term in group])
                ids = torch.tensor([[row[term.role] for term in group]])
                read = [
                    stream.read(ids[:, :, at : at + step], torch.full((1, len(group)), at))
                    for at in range(0, settings.prompt_tokens, step)
                ]
                scores |= dict(zip(group, torch.cat(read, dim=2).unbind(1), strict=True))
            likeliest.append(mixture.combine(scores, [1.0]).argmax(-1))
        changed += int((likeliest[0] != likeliest[1]).sum())
        positions += likeliest[0].numel()
    return {"positions": positions, "changed": changed}


def synchronise(mixture: Mixture) -> None:
    if mixture.base.source.device.type == "cuda":
        torch.cuda.synchronize()


def trio(settings: Bench) -> tuple[Mixture, str]:
    """The models: random Llamas of the sizes asked for, or a family's with a registered expert or a fresh adapter."""
    mixture = fresh(settings) if settings.expert is None else registered(settings, settings.expert)
    name = "random" if settings.trio == "random" else settings.expert or settings.family.name
    sources: list[Any] = [term.source for term in (mixture.base, mixture.pairs[0][1])]
    base, anti = (source.model for source in sources)
    return mixture, f"{name}: base {size(base)}, small {size(anti)}, {base.dtype}".replace("torch.", "")


def fresh(settings: Bench) -> Mixture:
    """A base and a small model with a random adapter on every linear layer."""
    from proxytune.models.loading import load_model

    if settings.trio == "family":
        base, small = (load_model(ref, settings.dtype) for ref in (settings.family.base_ref, settings.family.small))
    else:
        base, small = (
            random_llama(shape, settings.vocabulary, settings.dtype) for shape in (settings.base, settings.small)
        )
    attach_random(small)
    vocabulary = Vocabulary(min(base.config.vocab_size, small.config.vocab_size), ())
    source = LocalSource(quicken(small, second_copy=False), vocabulary.size)
    pair = (Term(source, "expert", 1), Term(source, "anti", 0))
    return Mixture(Term(LocalSource(quicken(base), vocabulary.size), "base"), vocabulary, (pair,))


def registered(settings: Bench, name: str) -> Mixture:
    """The family's base with an expert, as `decode` loads them."""
    from proxytune.experts.registry import Registry
    from proxytune.models import trio as trios
    from proxytune.stages.shared.trio import files_of, mixtures

    expert = Registry(settings.outputs / "registry").checked(name)
    return mixtures(trios.load(settings.family.base_ref, [files_of(expert)], settings.dtype))["steered"]


def size(model) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.3g}M"


def random_llama(shape: Sequence[int], vocabulary: int, dtype: str):
    """A Llama of (layers, width, feed-forward width, heads) with random weights, made on the device itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, inner, heads = shape
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def attach_random(small):
    """A random LoRA adapter of rank 16 on every linear layer, as the engine holds a registered expert."""
    import tempfile
    from pathlib import Path

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    with quiet():
        tuned = get_peft_model(small, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        tuned.unload()
        attach(small, [Path(folder)])


def prompts(settings: Bench, mixture: Mixture, count: int) -> list[Prompts]:
    """Random ids for random models. For others what their base says by itself, sampled, so that agreement on what
    follows is that on text."""
    chosen, length = random.Random(0), settings.prompt_tokens
    if settings.trio == "random":
        rows = [[chosen.randrange(3, mixture.vocabulary.size) for _ in range(length)] for _ in range(count)]
    else:
        source: Any = mixture.base.source
        first = source.model.config.bos_token_id or 0
        asked = [
            Request(same(mixture, [first]), Limits(length), (0.0,), Sampling(temperature=1, seed=place))
            for place in range(count)
        ]
        said = dict(Engine(mixture, Tokenizer(), batch_size=count).run(asked))
        rows = [[first, *said[place].token_ids][:length] for place in range(count)]
    return [same(mixture, row) for row in rows]


def same(mixture: Mixture, ids: list[int]) -> Prompts:
    return {term.role: ids for term in mixture.terms}


class Tokenizer:
    """Where only ids are timed."""

    def decode(self, ids, skip_special_tokens=True) -> str:
        return ""


def engine(mixture: Mixture, requests: Sequence[Request], **how) -> Engine:
    made = Engine(mixture, Tokenizer(), **how)
    list(made.run(requests))
    return made


def batches(settings: Bench, mixture: Mixture, rows: Sequence[Prompts]) -> list[Contender]:
    """Plain base decoding, the obvious loop and the engine at each batch size; speculation at imposed acceptance."""
    found = []
    source: Any = mixture.base.source
    model = source.model
    for size in settings.batch_sizes:  # rows
        requests = [Request(row, Limits(settings.tokens), (1.0,)) for row in rows[:size]]
        plain = f"base alone, generate, batch {size}"
        ids = torch.tensor([row["base"] for row in rows[:size]], device=model.device)
        found.append(Contender(plain, plain, lambda ids=ids: generate(model, ids, settings.tokens)))
        found.append(
            Contender(f"obvious loop, batch {size}", plain, lambda ids=ids: obvious(mixture, ids, settings.tokens))
        )
        drafting = [(f"engine, {name} drafts", {"drafter": name}) for name in settings.drafters]
        for name, how in (("engine, no drafts", {}), *drafting):
            work = lambda requests=requests, how=how: engine(mixture, requests, batch_size=64, **how)  # noqa: E731
            found.append(Contender(f"{name}, batch {size}", plain, work))
        replies = dict(Engine(mixture, Tokenizer()).run(requests)) if settings.acceptances else {}
        truth = [replies[place].token_ids for place in sorted(replies)]
        for acceptance in settings.acceptances:
            work = lambda requests=requests, a=acceptance, t=truth: engine(  # noqa: E731
                mixture, requests, drafter=Imposed(mixture, t, a)
            )
            found.append(Contender(f"engine, acceptance {acceptance:g} imposed, batch {size}", plain, work))
    return found


def generate(model, ids_BT: torch.Tensor, count: int) -> None:
    """transformers' own greedy decoding."""
    model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip


def obvious(mixture: Mixture, ids_BT: torch.Tensor, count: int) -> torch.Tensor:
    """What one writes first: three models with a cache each, stepped one after the other, arg-max of the sum."""
    from transformers import DynamicCache

    caches = {term: DynamicCache() for term in mixture.terms}
    said, step_BT = [], ids_BT
    for _ in range(count):
        logits = {}
        for term in mixture.terms:
            source: Any = term.source
            ACTIVE.set((term.member,))
            scores_BTV = source.model(step_BT, past_key_values=caches[term], use_cache=True).logits
            logits[term] = scores_BTV[:, -1, : mixture.vocabulary.size]
        ((expert, anti),) = mixture.pairs
        step_BT = (logits[mixture.base] + 1.0 * (logits[expert] - logits[anti])).argmax(-1, keepdim=True)
        said.append(step_BT)
    return torch.cat(said, dim=1)


class Imposed:
    """Drafts at the expert's cost, of which a given share holds: random weights agree on nothing.

    Which positions hold is shuffled in blocks of ten, so that short replies have the share that is asked for.
    """

    def __init__(self, mixture: Mixture, truth: Sequence[Sequence[int]], acceptance: float):
        expert = mixture.pairs[0][0]
        self.terms = tuple(term for term in mixture.terms if term.source is expert.source)
        self.truth, shuffled = truth, random.Random(0)
        ten = [i < round(10 * acceptance) for i in range(10)]
        self.holds = [[each for _ in range(0, len(row), 10) for each in shuffled.sample(ten, 10)] for row in truth]

    def propose(self, round: Round, count: int) -> None:
        for position in range(count):
            round.extend(self.terms, position + 1)
            drafted = [[self._token(row, position, round.mixture.vocabulary.size)] for row in round.rows.each]
            round.draft(torch.tensor(drafted, device=round.rows.device))

    def _token(self, row, position: int, size: int) -> int:
        truth, place = self.truth[row.handle], len(row.reply.token_ids) + position
        if place >= len(truth):
            return 0
        return truth[place] if self.holds[row.handle][place] else (truth[place] + 1) % size


def alphas(settings: Bench, mixture: Mixture, rows: Sequence[Prompts]) -> list[Contender]:
    """Eleven alphas against one, written and scored."""
    values = [(i / 5,) for i in range(11)]
    requests = [Request(rows[0], Limits(settings.tokens), alpha) for alpha in values]
    given = [Given(each, each["base"][: settings.tokens]) for each in rows[:2]]
    one, eleven = "one alpha written", "11 alphas written together"
    apart, pass_ = "11 alphas scored one by one", "11 alphas scored in one pass"
    return [
        Contender(one, one, lambda: engine(mixture, requests[:1])),
        Contender(eleven, one, lambda: engine(mixture, requests)),
        Contender(apart, apart, lambda: [list(losses(mixture, given, [alpha])) for alpha in values]),
        Contender(pass_, apart, lambda: list(losses(mixture, given, values))),
    ]


def mixed(settings: Bench, mixture: Mixture, rows: Sequence[Prompts]) -> list[Contender]:
    """Replies of mixed lengths: places are filled again at once, or a batch waits for its longest."""
    chosen, rows = random.Random(1), rows[:16]
    lengths = [max(1, round(settings.tokens * chosen.paretovariate(1.5) / 3)) for _ in rows]
    requests = [Request(row, Limits(min(n, 4 * settings.tokens)), (1.0,)) for row, n in zip(rows, lengths, strict=True)]

    def static() -> None:
        for at in range(0, len(requests), 4):
            part = requests[at : at + 4]
            most = max(request.limits.max_new_tokens for request in part)
            engine(mixture, [Request(request.prompts, Limits(most), (1.0,)) for request in part], batch_size=4)

    name, refilled = "16 mixed lengths, batches of 4 that wait", "16 mixed lengths, 4 places refilled"
    return [
        Contender(name, name, static),
        Contender(refilled, name, lambda: engine(mixture, requests, batch_size=4)),
    ]


def pair(mixture: Mixture) -> list[Contender]:
    """Expert and anti as rows of one forward against one small model, one token each; for an expert that is a LoRA."""
    ((expert, anti),) = mixture.pairs
    if expert.source is not anti.source:
        return []
    source: Any = anti.source
    token = torch.zeros(1, 1, 1, dtype=torch.int64)
    place = torch.full((1, 1), 64)
    both, single = source.open(1, 128, (1, 0)), source.open(1, 128, (0,))

    def steps(stream, members: int) -> None:
        for _ in range(20):
            stream.read(token.expand(1, members, 1), place.expand(1, members))

    one = "20 steps of one small model"
    return [
        Contender(one, one, lambda: steps(single, 1)),
        Contender("20 steps of expert and anti, shared weights", one, lambda: steps(both, 2)),
    ]
