"""The page: what is sent, and, where a browser is, what it does there."""

from __future__ import annotations

import importlib.util
import re
import shutil
from html.parser import HTMLParser

import httpx2
import pytest

from proxytune.serving.api import FILES, PAGE
from tests.serving.conftest import STEERED, until

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
in_a_browser = pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None, reason="no chromium with playwright here"
)
TEXTS = {name: (PAGE / name).read_text("utf-8") for name in FILES.values()}


class Elements(HTMLParser):
    """Start tags with their attributes, and those inside a label."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.labelled: set[str | None] = set()
        self.within = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        each = dict(attributes)
        self.found.append((tag, each))
        self.within = self.within or tag == "label"
        if tag == "label":
            self.labelled.add(each.get("for"))
        elif self.within:
            self.labelled.add(each.get("id"))

    def handle_endtag(self, tag):
        self.within = self.within and tag != "label"


def test_the_page_is_three_small_files_that_name_no_other_place(server):
    for path, name in FILES.items():
        answer = httpx2.get(server.url + path, timeout=60)
        assert answer.text == TEXTS[name] and "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["content-type"].split(";")[0] in ("text/html", "text/css", "text/javascript")
    assert sum(map(len, TEXTS.values())) < 25_000
    assert not re.search(r"https?:|//[a-z]|@import|url\(|style=", "".join(TEXTS.values()))


def test_every_element_that_the_script_wants_is_in_the_page():
    wanted = set(re.findall(r'\$\("([\w-]+)"\)', TEXTS["page.js"])) | {"base", "expert", "steered"}
    ids = [each["id"] for _, each in Elements(TEXTS["index.html"]).found if "id" in each]
    assert wanted <= set(ids) and len(ids) == len(set(ids))


def test_every_field_has_a_label_and_every_reference_a_target():
    elements = Elements(TEXTS["index.html"])
    ids = {each.get("id") for _, each in elements.found}
    for tag, each in elements.found:
        if tag in ("input", "textarea", "select"):
            assert each["id"] in elements.labelled or each.get("aria-label")
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert each.get(name) is None or each[name] in ids
    assert any(each.get("aria-live") == "polite" for _, each in elements.found)


def test_text_and_marks_stand_out_in_light_and_in_dark():
    """Contrast of at least 4.5 (WCAG 2.2 AA), for the colours of either scheme."""

    def luminance(colour: str) -> float:
        full = colour if len(colour) == 6 else "".join(2 * c for c in colour)
        parts = [int(full[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    schemes = re.findall(r":root \{(.*?)\}", TEXTS["page.css"], flags=re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): #([0-9a-f]+)", scheme))
        for ink in ("ink", "soft", "accent", "wrong", "base", "expert", "steered", "anti"):
            assert contrast(colours[ink], colours["ground"]) > 4.5 < contrast(colours[ink], colours["raised"])
        assert contrast(colours["ink"], colours["changed"]) > 4.5
        assert contrast(colours["changed-line"], colours["raised"]) > 3


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A phone in the dark; `said` is what its console heard, `asked` where it looked."""
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    page.set_default_timeout(120_000)
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(server.url)
    page.locator("#slider-1").wait_for()
    yield page
    page.close()
    assert not [text for text in page.said if "400 (Bad Request)" not in text]  # the browser's own note of those
    assert all(url.startswith(server.url + "/") for url in page.asked)


def done(page) -> None:
    page.locator("#status", has_text="Done").wait_for()


def texts(page) -> list[str]:
    return [page.text_content(f"#{name}") for name in ("base", "expert", "steered")]


def shows(page, name: str, text: str) -> None:
    """Wait for a text; a half character at its end is not shown."""
    until(lambda: page.text_content(f"#{name}") == text.rstrip("\ufffd"), 20)


def write(page, **fields: str) -> None:
    for name, value in fields.items():
        page.fill(f"#{name.replace('_', '-')}", value)
    page.press("#prompt", "Control+Enter")
    done(page)


@in_a_browser
def test_three_texts_stream_in_and_a_token_tells_its_probabilities(page, server):
    assert page.input_value("#prompt").startswith("Question: ")  # a prompt to begin with
    write(page, prompt="Say 1.", tokens="8", temperature="1", number_0="2.5")
    how = {"prompt": "Say 1.", "max_tokens": 8, "temperature": 1, "seed": 0}
    client = server.client()
    steered = client.completions.create(model=STEERED, **how, logprobs=1, extra_body={"alpha": [2.5, 0]}).choices[0]
    alone = [client.completions.create(model=model, **how).choices[0].text for model in ("base", "expert")]
    for name, text in zip(("base", "expert", "steered"), (*alone, steered.text), strict=True):
        shows(page, name, text)
    changed = sum(each["changed"] for each in steered.logprobs.steering)
    assert page.locator("#steered .changed").count() == changed > 0
    assert page.text_content("#meta-steered").startswith(f"{changed} of ")
    page.hover("#steered .changed >> nth=0")
    assert "the base would have said" in page.text_content("#told")
    assert page.locator("#columns th").all_text_contents()[:3] == ["token", "steered", "base"]


@in_a_browser
def test_the_keyboard_alone_writes_reads_and_inspects(page):
    page.fill("#tokens", "8")
    page.fill("#prompt", "Say ")
    page.focus("#prompt")
    page.keyboard.type("4.")
    for focused in ("on-0", "number-0", "slider-0"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == focused
    page.keyboard.press("ArrowRight")
    assert page.input_value("#number-0") == "0.55"
    page.keyboard.press("Control+Enter")
    done(page)
    page.focus("#steered span >> nth=0")
    said = page.text_content("#told")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[...document.activeElement.parentElement.children].indexOf(document.activeElement)") == 1
    assert page.text_content("#told") != said
    page.keyboard.press("End")
    focused = page.locator("#steered span:focus")
    assert focused.get_attribute("aria-selected") == "true" and focused.get_attribute("tabindex") == "0"
    assert page.locator("#steered span[tabindex='0']").count() == 1
    assert page.get_attribute("#steered", "aria-description") == page.text_content("#steered")


@in_a_browser
def test_a_link_brings_the_state_back_and_moving_alpha_writes_the_steered_text_alone(page):
    write(page, prompt="Say 2.", tokens="8", temperature="1", number_0="1.5", number_1="-0.5")
    before, link = texts(page), page.url
    page.goto("about:blank")
    page.goto(link)
    done(page)
    assert [page.input_value(f"#number-{i}") for i in (0, 1)] == ["1.5", "-0.5"]
    assert texts(page) == before
    asked = len(page.asked)
    page.fill("#number-0", "0")
    page.fill("#number-1", "0")
    shows(page, "steered", before[0])
    assert page.locator("#steered .changed").count() == 0 and len(page.asked) == asked + 1


@in_a_browser
def test_experts_are_picked_alone_and_several_at_once(page, server):
    def steered(**steering):
        asked = {"prompt": "Say 5.", "max_tokens": 8, "temperature": 1, "seed": 0, "extra_body": {"steering": steering}}
        return server.client().completions.create(model=STEERED, **asked).choices[0].text

    write(page, prompt="Say 5.", tokens="8", temperature="1", number_0="2", number_1="1.5")
    shows(page, "steered", steered(**{"qa@best": 2, "style@v1": 1.5}))
    page.uncheck("#on-0")
    shows(page, "steered", steered(**{"style@v1": 1.5}))
    assert page.is_disabled("#slider-0")
    page.select_option("#alone", "style@v1")
    how = {"prompt": "Say 5.", "max_tokens": 8, "temperature": 1, "seed": 0}
    shows(page, "expert", server.client().completions.create(model="style@v1", **how).choices[0].text)
    page.uncheck("#on-1")
    shows(page, "steered", texts(page)[0])
    page.click("#share")
    link = page.url
    page.goto("about:blank")
    page.goto(link)
    done(page)
    assert not page.is_checked("#on-0") and not page.is_checked("#on-1")
    assert page.input_value("#alone") == "style@v1"


@in_a_browser
def test_what_the_server_refuses_is_told_and_escape_stops(page):
    page.fill("#prompt", "x " * 3000)
    page.press("#prompt", "Control+Enter")
    page.locator("#status.wrong", has_text="the models read 2048").wait_for()
    page.fill("#prompt", "Say 6.")
    page.fill("#tokens", "2000")
    page.press("#prompt", "Control+Enter")
    page.locator("#meta-steered", has_text="tokens").wait_for()
    page.keyboard.press("Escape")
    page.locator("#status", has_text="Stopped").wait_for()
    assert page.is_disabled("#stop") and page.locator(".text[aria-busy=true]").count() == 0


@in_a_browser
def test_a_phone_shows_it_without_scrolling_sideways_and_in_the_dark(page):
    write(page, prompt="Say 3. " * 30, tokens="30")
    page.hover("#steered span >> nth=0")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 19, 21)"
