"""The thread that runs the engines: what waits, ends, fails or is cancelled never takes the others along."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from proxytune.decoding.background import Away, Background
from proxytune.decoding.engine import Engine
from proxytune.decoding.mixture import Mixture
from proxytune.decoding.request import Limits, Request
from proxytune.errors import ModelError, SettingsError
from proxytune.serving.loop import Busy, Closed, Job, Loop, Update
from proxytune.steering.choice import Sampling
from tests.decoding.test_remote import engine as remote_engine
from tests.decoding.test_remote import serving
from tests.decoding.tiny_models import SIZE, ByteTokenizer, lora_mixture
from tests.remote import faults
from tests.serving.conftest import until

PROMPTS = {"base": [3, 4], "expert": [9], "anti": [3, 4, 5]}


def asked(seed: int = 1, count: int = 6, alpha: float = 0.7, **limits) -> Request:
    return Request(PROMPTS, Limits(count, **limits), (alpha,), Sampling(1.0, seed=seed))


def alone(request: Request) -> str:
    ((_, reply),) = Engine(lora_mixture(), ByteTokenizer()).run([request])
    return reply.text


class Heard:
    """The job of a request, and what became of it."""

    def __init__(self, request: Request, engine: str = "steered", streams: bool = True):
        self.updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        self.job = Job(engine, request, self.updates.put, streams)

    def all(self) -> list[Update]:
        found = [self.updates.get(timeout=120)]
        while not found[-1].last:
            found.append(self.updates.get(timeout=120))
        return found

    @property
    def text(self) -> str:
        return "".join(update.text for update in self.all())


@pytest.fixture
def engines() -> dict[str, Callable[[], Engine]]:
    mixture = lora_mixture()
    base = Mixture(mixture.base, mixture.vocabulary)
    make = partial(Engine, tokenizer=ByteTokenizer(), batch_size=2)
    return {"steered": partial(make, mixture), "base": partial(make, base)}


@pytest.fixture
def loop(engines):
    loop = Loop(engines, queue=6)
    yield loop
    loop.close()


def test_replies_are_what_the_engine_says_alone_streamed_or_not(loop):
    heard = [Heard(asked(seed), streams=bool(seed % 2)) for seed in range(6)]
    loop.submit([each.job for each in heard])
    for seed, each in enumerate(heard):
        updates = each.all()
        assert "".join(u.text for u in updates) == alone(asked(seed)) and updates[-1].finish_reason == "length"
        assert sum(len(u.token_ids) for u in updates) == 6 and (len(updates) > 1) == bool(seed % 2)
    assert loop.open == {"steered": 0, "base": 0}


def test_many_threads_ask_at_once(engines):
    loop, found = Loop(engines, queue=100), {}

    def ask(seed: int) -> None:
        heard = Heard(asked(seed, alpha=seed / 10))
        loop.submit([heard.job])
        found[seed] = heard.text

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    loop.close()
    assert found == {seed: alone(asked(seed, alpha=seed / 10)) for seed in range(24)}


def test_all_of_a_request_s_choices_are_taken_or_none(loop):
    long = [Heard(asked(seed, 400)) for seed in range(5)]
    loop.submit([each.job for each in long])
    with pytest.raises(Busy):
        loop.submit([Heard(asked(seed)).job for seed in range(4)])
    assert loop.open["steered"] == 5
    loop.submit([Heard(asked(seed)).job for seed in range(3)])
    other = Heard(Request(PROMPTS, Limits(2)), "base")  # another engine has a queue of its own
    loop.submit([other.job])
    assert len(other.all()) == 2


def test_a_cancelled_request_is_not_heard_of_again_and_the_next_takes_its_place(loop):
    long = [Heard(asked(seed, 4000)) for seed in range(3)]
    loop.submit([each.job for each in long])
    assert not long[0].updates.get(timeout=120).last
    loop.cancel([each.job for each in long])
    until(lambda: loop.open["steered"] == 0)
    assert loop.cancelled == 3 and not loop.engines["steered"].busy
    after = Heard(asked(4))
    loop.submit([after.job])
    assert after.text == alone(asked(4))
    loop.cancel([after.job])  # it has ended
    handled = threading.Event()
    loop.inbox.put(handled.set)
    assert handled.wait(60) and loop.cancelled == 3 and loop.open["steered"] == 0


def test_what_an_engine_refuses_is_told_to_its_owner_alone(loop):
    wrong, right = Heard(Request(PROMPTS, Limits(3), (1.0, 2.0))), Heard(asked())
    loop.submit([wrong.job, right.job])
    (update,) = wrong.all()
    assert isinstance(update.error, SettingsError) and right.text == alone(asked())


def test_a_round_that_fails_ends_its_engine_s_requests_and_a_new_engine_goes_on(loop):
    broken = loop.engines["steered"]
    broken.step = lambda: (_ for _ in ()).throw(MemoryError("no room"))
    failed = [Heard(asked(seed)) for seed in range(3)]
    other = Heard(Request(PROMPTS, Limits(4)), "base")
    loop.submit([*(each.job for each in failed), other.job])
    assert all(isinstance(each.all()[-1].error, MemoryError) for each in failed)
    assert other.all()[-1].finish_reason == "length"
    until(lambda: loop.engines["steered"] is not broken)
    again = Heard(asked())
    loop.submit([again.job])
    assert again.text == alone(asked()) and loop.failures >= 1 and loop.alive


def test_an_error_of_one_line_is_logged_as_one_line(loop, capfd):
    told = ModelError("http://x: no connection, 3 times in a row", "see whether the server runs")
    broken = loop.engines["steered"]
    broken.step = lambda: (_ for _ in ()).throw(told)
    failed = Heard(asked())
    loop.submit([failed.job])
    assert failed.all()[-1].error is told
    assert capfd.readouterr().err == f"proxytune: {told}\n"  # logged before it is told


@pytest.fixture
def away(engines):
    """A loop, the server that its steered engine asks, and what lets that server answer."""
    released = threading.Event()

    def waits(handler, reply) -> None:
        released.wait(60)
        handler.reply(200, reply)

    with serving("vllm") as server:
        server.luck = lambda: None if released.is_set() else waits
        background = Background()
        steered = lambda: Away(remote_engine(server, lora_mixture(), SIZE, batch_size=2), background)  # noqa: E731
        loop = Loop({**engines, "steered": steered}, queue=6)
        yield loop, server, released
        released.set()
        if loop.alive:
            loop.close()


def test_who_waits_for_a_slow_server_holds_up_no_other_engine_and_may_leave(away):
    loop, server, released = away
    heard = [Heard(asked(seed)) for seed in range(4)]
    loop.submit([each.job for each in heard])
    until(lambda: len(server.asked) == 2)
    other = Heard(Request(PROMPTS, Limits(3)), "base")
    loop.submit([other.job])
    assert other.all()[-1].finish_reason == "length"
    loop.cancel([heard[0].job, heard[2].job])
    until(lambda: loop.open["steered"] == 2, 1)
    released.set()
    assert [heard[seed].text for seed in (1, 3)] == [alone(asked(seed)) for seed in (1, 3)]
    assert heard[0].updates.empty() and heard[2].updates.empty() and loop.failures == 0


def test_the_end_waits_for_no_server(away):
    loop, server, _ = away
    heard = Heard(asked())
    loop.submit([heard.job])
    until(lambda: len(server.asked) == 1)
    began = time.monotonic()
    loop.close()
    assert isinstance(heard.all()[-1].error, Closed) and time.monotonic() - began < 5


def test_a_fault_of_one_reply_is_told_to_its_owner_alone(away):
    loop, server, released = away
    released.set()
    server.faults = [faults.status(400)]
    heard = [Heard(asked(seed)) for seed in range(4)]
    loop.submit([each.job for each in heard])
    ended = [each.all() for each in heard]
    failed = [updates[-1].error for updates in ended if updates[-1].error]
    assert len(failed) == loop.failures == 1 and "answered 400" in str(failed[0])
    for seed, updates in enumerate(ended):
        assert updates[-1].error or "".join(u.text for u in updates) == alone(asked(seed))


def test_closing_ends_what_is_left_and_takes_no_more(engines):
    loop = Loop(engines, queue=10)
    heard = [Heard(asked(seed, 4000)) for seed in range(5)]
    loop.submit([each.job for each in heard])
    heard[0].updates.get(timeout=120)
    loop.close()
    assert all(isinstance(each.all()[-1].error, Closed) for each in heard)
    assert loop.open["steered"] == 0 and not loop.alive
    with pytest.raises(Closed):
        loop.submit([Heard(asked()).job])
