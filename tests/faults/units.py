"""Marks of the units of work that a process finishes, in a file that outlives it: one letter each.

s: a step of training. r: a reply. l: the losses of a batch of rows. t: the tokens of a batch of replies.
d: how far each alpha moved a batch of rows.
"""

from __future__ import annotations

import functools
import os


def count(path: str) -> None:
    from transformers import Trainer

    from proxytune.analysis import divergence, tokens
    from proxytune.decoding.engine import Engine
    from proxytune.evaluation import points

    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    steps, replies, losses, records = Trainer.training_step, Engine.run, points.losses, tokens.records
    divergences = divergence.divergences

    @functools.wraps(steps)
    def step(*args, **kwargs):
        found = steps(*args, **kwargs)
        os.write(handle, b"s")
        return found

    def each(made, letter):
        for item in made:
            os.write(handle, letter)
            yield item

    Trainer.training_step = step
    Engine.run = lambda *args, **kwargs: each(replies(*args, **kwargs), b"r")
    points.losses = lambda *args, **kwargs: each(losses(*args, **kwargs), b"l")
    tokens.records = lambda *args, **kwargs: each(records(*args, **kwargs), b"t")
    divergence.divergences = lambda *args, **kwargs: each(divergences(*args, **kwargs), b"d")
