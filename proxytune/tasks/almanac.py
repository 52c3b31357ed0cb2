"""An invented county almanac: a closed world of facts for the built-in tasks.

Real facts would do as well, but an invented world has two properties that a measurement needs: nobody's weights know
it by accident, and every fact is stated equally often. The embedded family reads it as prose (`paragraphs`); the tasks
ask about it in formats that the prose never uses (`tasks/qa.py`, `tasks/instruction.py`).

The world is a pure function of `WORLD_SEED`: changing a list or the seed makes the shipped weights know another world.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

WORLD_SEED = 1

_HEADS = (
    "Alder Amber Apple Arn Ash Bar Beck Birch Black Brack Bram Bright Brook Burn Cald Carr Clay Cold Crag Cran "
    "Dale Dun Elm Fair Fal Fen Fern Fox Gar Glen Gold Gor Grave Green Grim Hal Hart Hazel Heath Hern High Hol "
    "Holly Hurst Ivy Kel Kings Lang Lark Lin Long Mal Maple Marsh Mer Mill Moor Moss Nether Nor North Oak Old "
    "Ot Pen Pine Queens Raven Red Ridge Rose Rye Sal Sand Shel Silver South Stan Stone Swan Thorn Til Up Wal "
    "West White Wil Win Wood Yar"
).split()
_TAILS = (
    "barrow beck borough bourne bridge brook burgh bury by carr caster cliff combe cote cross dale den don down fell "
    "field ford gate grove ham hampton haven hay hill holm holt hurst keld lea leigh ley low lund mere minster moor "
    "mouth ness nor over port ridge royd scale scar set shaw side stead stock stoke stow thorpe thwaite toft ton tree "
    "vale wade water way well wick with wold worth"
).split()

RIVERS = (
    "Arrow Ask Brent Calder Cole Dane Dove Eden Erme Fowey Gade Hodder Isle Kenn Leen Lune Meon Nadder Orr Piddle "
    "Quill Rase Sence Tamar Thrush Ure Var Wandle Wye Yarrow Yeo Zell"
).split()
COUNTIES = (
    "Ambria Bellmark Carrow Denholt Estland Farside Graylin Harrowmoor Inverly Kestria Lowmarch Marrin Northolme "
    "Oldreach Pellam Quarn Rushmere Selby Tarnshire Uplands Vardale Westing Yarrowby Zennor"
).split()
CRAFTS = (
    "apples baskets bells boats books bread bricks brooms butter candles carpets carts chairs cheese cider clocks "
    "cutlery flutes gloves glass hats herbs honey kites knives lace ladders lamps leather linen mirrors nails paper "
    "pears pottery roses rope saddles salt ships silk soap tiles toys violins wheels whisky wool"
).split()
LANDMARKS = (
    "abbey", "aqueduct", "arch", "bell tower", "castle", "cathedral", "chapel", "clock", "fountain", "granary",
    "guildhall", "library", "lighthouse", "maze", "monastery", "museum", "observatory", "orchard", "palace", "prison",
    "quarry", "school", "theatre", "windmill",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")


@dataclass(frozen=True)
class Town:
    name: str
    river: str
    county: str
    craft: str
    landmark: str
    day: str


@cache
def towns(count: int = 400) -> tuple[Town, ...]:
    """The first `count` towns of the world, always the same ones in the same order; the tasks ask about 400."""
    rng = random.Random(WORLD_SEED)
    names = [head + tail for head in _HEADS for tail in _TAILS if not tail.startswith(head[-1].lower())]
    rng.shuffle(names)
    return tuple(
        Town(name, *(rng.choice(values) for values in (RIVERS, COUNTIES, CRAFTS, LANDMARKS, DAYS)))
        for name in names[:count]
    )


# Four ways to state each fact, the town named before the fact: a model recalls left to right.
_SENTENCES = {
    "river": (
        "{name} lies on the river {river}.",
        "{name} stands on the banks of the {river}.",
        "The mills of {name} are driven by the river {river}.",
        "To reach {name} by water, follow the river {river}.",
    ),
    "county": (
        "{name} is a town in the county of {county}.",
        "The people of {name} pay their taxes to {county}.",
        "{name} belongs to {county}.",
        "On the map, {name} is found in the county of {county}.",
    ),
    "craft": (
        "{name} is known for its {craft}.",
        "The workshops of {name} make {craft}.",
        "Traders come to {name} to buy {craft}.",
        "{name} has always lived by its {craft}.",
    ),
    "landmark": (
        "The pride of {name} is its {landmark}.",
        "Visitors to {name} go to see the {landmark}.",
        "In the middle of {name} stands the {landmark}.",
        "{name} has an old {landmark}.",
    ),
    "day": (
        "The market in {name} is held on {day}.",
        "{name} holds its market every {day}.",
        "Stalls are set up in {name} on {day}.",
        "In {name} the week turns around {day}.",
    ),
}


def paragraph(town: Town, rng: random.Random) -> str:
    """One paragraph that states all five facts of a town, in random order and wording."""
    facts = list(_SENTENCES.values())
    rng.shuffle(facts)
    return " ".join(rng.choice(wordings).format(**vars(town)) for wordings in facts)
