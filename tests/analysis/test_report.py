from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from proxytune.analysis import curves
from proxytune.analysis.changes import summarise
from proxytune.analysis.generations import Generations, packed
from proxytune.analysis.report import Found, page
from tests.analysis.test_changes import SUM, record, some
from tests.analysis.test_curves import apart, records
from tests.analysis.test_tables_figures import make

NASTY = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> & <b>\u2028'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def found(rows: int = 6, text: str = "7*7 =49\n", **changes) -> Found:
    summary = make(alphas=(0.0, 0.5, 1.0), chosen=0.5)
    summary |= curves.told(records({0.0: 3.0, 0.5: 2.0, 1.0: 2.5}), apart([0.0, 0.5, 1.0]), "loss", samples=50)
    tokens = {"task": "math", "family": "tiny", "system": "steered", "alpha": 0.5, "expert": "math@v1"}
    ids = [f"r{i}" for i in range(rows)]
    generations = Generations(
        systems={"base": "base", "expert": "expert alone", "steered": "steered, alpha 0.5", "tuned": "base, tuned"},
        questions={id: (f"asked {text}", "49") for id in ids},
        texts={system: dict.fromkeys(ids, f"{system} {text}") for system in ("base", "steered")},
        scores={"base": {id: {"exact match": 0.0} for id in ids}, "steered": {"r0": {"exact match": 1.0}}},
        tokens={one["id"]: one for one in some(rows)},
    )
    given = {
        "title": f"math {text}",
        "summary": summary,
        "tokens": tokens | summarise(some(rows), "math", min_uses=4, samples=50),
        "generations": generations,
        "terms": {"base": text, "empty": ""},
        "commands": [f"proxytune evaluate {text}"],
        "settings": {"key": text},
        "notes": [text],
    }
    return Found(**(given | changes))


class Tags(HTMLParser):
    """Every element with its attributes, and all text outside scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def test_text_of_rows_and_models_is_never_markup():
    text = page(found(text=NASTY), 500)
    tags = Tags(text)
    assert len(tags.of("script")) == 2 and not tags.of("img") and not tags.of("b")
    assert not [attributes for _, attributes in tags.tags if any(name.startswith("on") for name in attributes)]
    assert data_of(text)["rows"][0]["texts"]["steered"] == f"steered {NASTY}"


@pytest.fixture(scope="module")
def text() -> str:
    return page(found(), 500)


def test_nothing_is_fetched_and_only_the_page_s_own_script_may_run(text):
    tags = Tags(text)
    links = [a.get(name) for _, a in tags.tags for name in ("src", "href", "xlink:href", "action") if a.get(name)]
    assert links and all(link.startswith("#") for link in links)
    assert "url(http" not in text and "@import" not in text
    (policy,) = [a["content"] for a in tags.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"


def test_every_part_is_there_and_can_be_found_without_eyes(text):
    tags = Tags(text)
    assert [a["id"] for a in tags.of("h2")] == ["results", "alpha", "tokens", "generations", "provenance"]
    assert {f"#{a['id']}" for a in tags.of("h2")} <= {a.get("href") for a in tags.of("a")}
    assert tags.of("html") == [{"lang": "en"}] and tags.of("meta")[1]["name"] == "viewport"
    pictures = tags.of("svg")
    assert len(pictures) >= 9 and all(a["role"] == "img" and a["aria-label"] for a in pictures)
    assert all(a["scope"] in ("row", "col") for a in tags.of("th"))
    assert len(tags.of("caption")) == len(tags.of("table"))
    ids = [a["id"] for _, a in tags.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in text and "max-width: 40rem" in text
    assert "proxytune evaluate" in text and "Best alpha by loss" in text


def test_parts_that_were_not_measured_are_left_out():
    text = page(found(summary=None, tokens=None, generations=Generations({}, {}, {})), 500)
    assert [a["id"] for a in Tags(text).of("h2")] == ["provenance"]
    alone = page(found(summary=make(), tokens=None), 500)
    assert [a["id"] for a in Tags(alone).of("h2")] == ["results", "generations", "provenance"]


def test_what_a_token_is_told_is_what_was_recorded():
    data, told = packed(found(rows=2).generations, 500)
    assert told == 2 and [system["key"] for system in data["systems"]] == ["base", "steered"]
    word, base, expert, anti, steered, base_rank, steered_rank, liked, share, changed = data["rows"][0]["tokens"][:10]
    assert (data["words"][word], data["words"][liked]) == ("7", "[bold]")
    assert (base, expert, anti, steered, share) == (200, 600, 200, 600, 500)
    assert (base_rank, steered_rank, changed) == (2, 1, 1)
    assert len(data["rows"][0]["tokens"]) == 10 * len(SUM)
    assert [data["words"][data["rows"][1]["tokens"][i * 10]] for i in range(6)] == ["7", "*", "7", " =", "49", "\n"]


def long(rows: int, tokens: int) -> Found:
    """Generations of many tokens, each with numbers of its own."""
    ids = [f"row-{i}" for i in range(rows)]
    told = {}
    for id in ids:
        one = record(id, (SUM * tokens)[:tokens], [0.123] * tokens, [0.987] * tokens, (SUM[::-1] * tokens)[:tokens])
        told[id] = one | {"top_logprobs": {"base": [[math.log(0.456)]] * tokens, "steered": [[0.0]] * tokens}}
    text = "some words that a model may write " * (tokens // 7)
    generations = Generations(
        {"base": "base", "expert": "expert alone", "steered": "steered", "tuned": "base, tuned"},
        {id: ("Question: how many are there?\n" * 5, "#### 49") for id in ids},
        {system: dict.fromkeys(ids, text) for system in ("base", "expert", "steered", "tuned")},
        tokens=told,
    )
    return found(generations=generations)


def test_five_hundred_generations_stay_under_five_megabytes_with_all_their_tokens():
    given = long(500, 60)
    data, told = packed(given.generations, 500)
    assert len(data["rows"]) == told == 500
    assert len(page(given, 500).encode()) < 5e6


def test_longer_ones_lose_their_tokens_before_their_text_and_the_page_says_so():
    given = replace(long(300, 400), summary=None)
    data, told = packed(given.generations, 500)
    assert 0 < told < len(data["rows"])
    assert [("tokens" in row) for row in data["rows"][:told]] == [True] * told
    text = page(given, 500)
    assert len(text.encode()) < 5e6 and f"The first {told:,} tell of their tokens" in text
    assert len(packed(given.generations, 7)[0]["rows"]) == 7 and "7 of 300 prompts" in page(given, 7)


def opened(text: str, folder: Path) -> str:
    """The page as a browser has it once its scripts have run."""
    (folder / "report.html").write_text(text, "utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", f"file://{folder / 'report.html'}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page in")
def test_a_browser_draws_ten_replies_and_their_tokens(tmp_path):
    drawn = opened(page(found(rows=23, text=NASTY), 500), tmp_path)
    tags = Tags(re.sub(r"<script.*?</script>", "", drawn, flags=re.DOTALL))
    assert len(tags.of("article")) == 10 and not tags.of("img")
    assert "23 of 23 prompts, page 1 of 3" in drawn
    assert len([a for a in tags.of("span") if a.get("class") == "changed"]) == 10 * 2
    assert [a for a in tags.of("div") if a.get("role") == "group" and "arrow keys" in (a.get("aria-label") or "")]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page in")
def test_the_arrow_keys_go_through_tokens_and_a_search_finds_prompts(text, tmp_path):
    script = """<script>
      const press = (key) => document.querySelector(".reply[aria-label*=arrow]")
        .dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      const search = document.getElementById("search");
      search.value = "R4"; search.dispatchEvent(new Event("input"));
      for (const key of ["End", "Home", "ArrowRight", "ArrowRight"]) press(key);
    </script></body>"""
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy".*?">', "", text)
    drawn = opened(without_policy.replace("</body>", script), tmp_path)
    assert "1 of 6 prompts, page 1 of 1" in drawn
    told = drawn[drawn.index('<div id="told"') :].partition("</div>")[0]
    assert "<code>7</code>" in told and "The base would have said [bold] (50.0%)" in told and "rank 2" in told
    assert re.findall(r"<td>([\d.]+%)</td>", told) == ["20.0%", "60.0%", "20.0%", "60.0%"]
    assert 'class="changed told"' in drawn and " hidden" not in told.partition(">")[0]
