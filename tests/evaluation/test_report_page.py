"""The report's page in a browser: it shows, sorts and filters, by hand and by keyboard."""

import re
import shutil

import numpy as np
import pytest

from tests.evaluation.a_report import HOSTILE, PAIRS_GIVEN, PROMPTS, REPORT, write


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return (write(tmp_path_factory.mktemp("evaluation")) / "report.html").as_uri()


@pytest.fixture
def open_page(browser, url):
    """Opens the report; at the end the page must have loaded nothing else and not complained."""
    contexts, complaints = [], []

    def make(width=1280, **settings):
        context = browser.new_context(viewport={"width": width, "height": 800}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked(request.url))
        page.goto(url)
        return page

    def asked(address):
        if address != url and not address.startswith("data:"):
            complaints.append(address)

    yield make
    for context in contexts:
        context.close()
    assert complaints == []


def similarities(page, where="#cards .main b"):
    return [float(text) for text in page.locator(where).all_text_contents()]


def expected(rows):
    return [round(row["similarity"], 3) for row in rows]


@pytest.mark.parametrize("javascript", [True, False])
def test_page_shows_the_verdict_and_no_markup_of_others(open_page, javascript):
    page = open_page(java_script_enabled=javascript)
    shown = [page.locator(name).inner_text() for name in (".verdict", ".detail")]
    assert " ".join(shown) == REPORT["verdict"]
    assert "output/<i>demo" in page.title()
    shown = page.locator("table.measures").first.inner_text()
    assert all(text in shown for text in ("0.610", "0.580 to 0.640", "small sample: <b>12</b>"))
    assert page.get_by_text("needs JavaScript").is_visible() is not javascript
    assert page.locator("#controls").is_visible() is javascript


def test_every_picture_is_drawn(open_page):
    page = open_page()
    page.evaluate("Promise.all([...document.images].map(image => image.decode()))")
    sizes = page.evaluate("[...document.images].map(image => [image.naturalWidth, image.alt])")
    assert len(sizes) == 4 * len(PROMPTS)  # two of a pair, in the gallery and in the table
    assert {width for width, _ in sizes} == {16, 256, 20}
    assert sizes[2:4] == [[256, "Generation generation-1"], [256, "Training image train-1"]]
    colour = (
        page.locator("#cards img")
        .nth(3)
        .evaluate(
            """image => { const context = document.createElement("canvas").getContext("2d");
        context.drawImage(image, 0, 0); return [...context.getImageData(5, 5, 1, 1).data]; }"""
        )
    )
    assert np.abs(np.array(colour[:3]) - (20, 200, 235)).max() <= 4


def test_captions_are_shown_as_text(open_page):
    page = open_page()
    captions = page.locator("#cards .caption:not(.other)").all_text_contents()
    assert captions == PROMPTS
    assert page.locator("#cards .caption").nth(0).inner_text() == HOSTILE[0]
    assert page.evaluate("window.hacked") is None
    page.locator("#cards .pictures").nth(4).click()
    assert page.locator("dialog dd").first.text_content() == HOSTILE[4]


@pytest.mark.parametrize("key", ["similarity", "ratio", "own_similarity", "prompt"])
def test_sorting_sorts(open_page, key):
    page = open_page()
    known = [row for row in PAIRS_GIVEN if row[key] is not None]
    unknown = [row for row in PAIRS_GIVEN if row[key] is None]
    if key == "prompt":  # the browser's collation is its own: the plain ones are enough here
        page.fill("#text", "a cat")
        known = known[len(HOSTILE) :]
    known.sort(key=lambda row: row[key], reverse="similarity" in key)
    page.select_option("#key", key)
    assert similarities(page) == expected(known + unknown)
    page.click("#reverse")
    assert similarities(page) == expected(known[::-1] + unknown)
    page.click("#as-table")
    page.locator(f"[data-key={key}] button").click()  # back
    cells = "#rows tr td:nth-child(2)"
    assert similarities(page, cells) == expected(known + unknown)
    order = "descending" if "similarity" in key else "ascending"
    assert page.locator("[aria-sort=ascending], [aria-sort=descending]").count() == 1
    assert page.locator(f"[data-key={key}]").get_attribute("aria-sort") == order


def test_a_heading_sorts_the_useful_way_first(open_page):
    page = open_page()
    page.click("#as-table")
    for key, order in [
        ("ratio", "ascending"),
        ("own_similarity", "descending"),
        ("prompt", "ascending"),
        ("similarity", "descending"),
    ]:
        page.locator(f"[data-key={key}] button").click()
        assert page.locator(f"[data-key={key}]").get_attribute("aria-sort") == order


def test_filters_filter(open_page):
    page = open_page()
    page.fill("#text", "A CAT")
    assert similarities(page) == expected(PAIRS_GIVEN[len(HOSTILE) :])
    page.fill("#text", "<script>")
    assert similarities(page) == expected(PAIRS_GIVEN[:1])
    page.fill("#text", "a dog 3")
    assert similarities(page) == expected([PAIRS_GIVEN[3], PAIRS_GIVEN[8]])
    page.fill("#text", "")
    page.check("#own")
    assert (
        page.locator("#cards .badge.strong").count() == 4
    )  # 0 and the odd ones, less those where it is unknown
    assert similarities(page) == expected([PAIRS_GIVEN[i] for i in (0, 1, 5, 9)])
    page.fill("#least", "0.7")
    assert similarities(page) == expected([PAIRS_GIVEN[i] for i in (0, 1, 5)])
    assert page.locator("#count").inner_text() == "3 of 12 pairs"
    page.fill("#text", "nothing like this")
    assert page.locator("#cards li").count() == 0
    page.get_by_text("Show all").click()
    page.locator("#cards li").nth(11).wait_for()
    assert page.locator("#empty").is_hidden()


def test_badges_and_scores_of_a_pair(open_page):
    cards = open_page().locator("#cards li")
    assert cards.nth(0).locator(".badge").all_text_contents() == [
        "own image",
        "flipped",
        "not authentic",
    ]
    assert cards.nth(0).locator(".scores").inner_text().startswith("similarity 0.950")
    assert "own 0.824" in cards.nth(2).inner_text()
    assert "ratio 0.20" in cards.nth(2).inner_text()
    assert "ratio" not in cards.nth(5).inner_text()
    assert cards.nth(8).locator(".badge").count() == 0


def test_keyboard_alone_goes_through_the_pairs(open_page):
    page = open_page()
    page.focus("#own")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("#dialog-title").inner_text() == "Pair 1 of 12"
    page.keyboard.press("ArrowLeft")  # there is none before
    page.keyboard.press("ArrowRight")
    assert page.locator("#dialog-title").inner_text() == "Pair 2 of 12"
    assert "generation-1" in page.locator("dialog").inner_text()
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()
    assert page.evaluate("document.activeElement.className") == "pictures"


def test_dark_scheme_changes_colours_and_stays_legible(open_page):
    def luminance(colour):
        channels = np.array([int(n) for n in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return float(linear @ (0.2126, 0.7152, 0.0722))

    backgrounds = {}
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        look = "node => [getComputedStyle(node).color, getComputedStyle(document.body).background]"
        for selector in (".verdict", ".note", ".meaning", ".interval", ".caption.other"):
            text, background = map(luminance, page.locator(selector).first.evaluate(look))
            contrast = (max(text, background) + 0.05) / (min(text, background) + 0.05)
            assert contrast > 4.5, (scheme, selector)
        backgrounds[scheme] = background
    assert backgrounds["light"] > 0.8
    assert backgrounds["dark"] < 0.05


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_runs_out_of_the_page(open_page, width):
    page = open_page(width)
    page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true; })")
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    page.click("#as-table")
    assert page.evaluate(fits)
    page.locator("#rows .pictures").nth(4).click()
    assert page.evaluate(fits)
    box = page.locator("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert box["height"] <= 800
