"""The report: files for tools that read back as written, and a page that works in a browser."""

import html.parser
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from iet_sd.evaluation import report as report_module
from iet_sd.evaluation.report import IMAGES, PAIRS, format_measure, histogram_plot, interval_bar

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<!-- <b onmouseover='window.hacked = 1'>\"quoted\" & 'single'</b>",
    "a fox 🦊 and an astronaut 👩‍🚀",
    "\u202eمرحبا بالعالم shalom שלום\u202c",
    "x" * 1000 + " word" * 200,  # 2,000 characters, half of them with nowhere to break
    "\u2028 {{ 7 * 7 }} ${7 * 7} \\u003c &lt;",
]
PROMPTS = [*HOSTILE, *(f"a cat {number}" for number in range(6))]


class Pictures:
    """Images of one colour each, of several shapes."""

    def __init__(self, prefix, count, green):
        self.ids = [f"{prefix}-{number}" for number in range(count)]
        self.green = green

    def __getitem__(self, index):
        if not 0 <= index < len(self.ids):
            raise IndexError(index)
        size = [(16, 16), (300, 200), (20, 40)][index % 3]
        return Image.new("RGB", size, (20 * index, self.green, 255 - 20 * index))


GENERATED = Pictures("generation", len(PROMPTS), green=100)
TRAIN = Pictures("train", 5, green=200)


def pair(number, **changes):
    """A row of the pairs; later ones are less similar, and some things are unknown."""
    similarity = 0.95 - 0.05 * number
    own = None if number % 4 == 3 else similarity if number % 2 else similarity - 0.013 * number
    return {
        "generation": GENERATED.ids[number],
        "prompt": PROMPTS[number],
        "prompt_id": f"p{number}",
        "image": 0,
        "path": f"generations/p{number}-0.png",
        "similarity": similarity,
        "own_similarity": own,
        "nearest_id": TRAIN.ids[number % 5],
        "nearest_caption": f"a dog {number % 5}",
        "nearest_index": number % 5,
        "flipped": number % 3 == 0,
        "ratio": None if number == 5 else (number * 7 % 12) / 10,
        "authentic": number > 4,
        **changes,
    }


PAIRS_GIVEN = [pair(number) for number in range(len(PROMPTS))]


def measure(value=0.5, low=None, high=None, **changes):
    return {
        "section": "Copying",
        "name": "memorization_score",
        "label": "Memorization score <s>",
        "embedder": "pixels",
        "value": value,
        "low": low,
        "high": high,
        "level": None if low is None else 0.95,
        "better": "lower",
        "meaning": "95th percentile of similarity.",
        "headline": True,
        "warning": None,
        **changes,
    }


HISTOGRAM = {
    "embedder": "pixels",
    "edges": [0.0, 0.25, 0.5, 0.75, 1.0],
    "generated": [0, 1, 3, 4],
    "heldout": [2, 6, 2, 0],
    "train": [0, 10, 10, 0],
}
REPORT = {
    "created": "2026-03-01T08:05:00+00:00",
    "command": "python evaluate.py --prompt '</pre><script>window.hacked = 1</script>'",
    "settings": {"embedders": ["pixels"], "negative_prompt": "</dl><b>", "lora_weights": None},
    "seed": 0,
    "versions": {"torch": "2.13.0"},
    "model": {"name": "output/<i>demo", "fingerprint": "9f" * 32},
    "data": {
        "train": {"name": "emoji", "count": 1662, "fingerprint": "ab" * 32},
        "heldout": {"name": "emoji, test", "count": 482, "fingerprint": "cd" * 32},
        "prompts": 12,
        "images_per_prompt": 1,
    },
    "measures": [
        measure(0.61, 0.58, 0.64),
        measure(-4.3, -5.2, -3.3, name="c_t", better="zero", warning="small sample: <b>12</b>"),
        measure(0.4, name="heldout_p95", headline=False),
        measure(31.2, 30, 33, section="Quality", name="fid", headline=False, warning="few"),
    ],
    "verdict": "The model copies <b>much</b>. By 0.1 of <i>it</i>.",
    "histograms": [HISTOGRAM],
}


ROWS = [
    {"set": name, "id": f"{name}-1", "group": "g", "similarity": 0.5, "ratio": None, "loss": 0.25}
    for name in ("train", "heldout")
]


def write(folder, report=REPORT, pairs=PAIRS_GIVEN, images=ROWS, train=TRAIN, **changes):
    report_module.write_report(folder, report, pairs, images, GENERATED, train, **changes)
    return folder


def read_json(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


class Page(html.parser.HTMLParser):
    """What a parser of HTML makes of the page: its tags, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"

    def handle_data(self, data):
        if self.inside:
            self.scripts.append(data)
        self.inside = False


def test_json_and_parquet_read_back_as_given(tmp_path):
    shuffled = [PAIRS_GIVEN[i] for i in np.random.default_rng(0).permutation(len(PAIRS_GIVEN))]
    write(tmp_path / "evaluation", pairs=shuffled)
    assert read_json(tmp_path / "evaluation" / "report.json") == {"schema_version": 1, **REPORT}
    table = parquet.read_table(tmp_path / "evaluation" / "pairs.parquet")
    assert table.schema.equals(PAIRS)
    assert table.to_pylist() == PAIRS_GIVEN
    table = parquet.read_table(tmp_path / "evaluation" / "images.parquet")
    assert table.schema.equals(IMAGES)
    assert table.to_pylist() == ROWS


def test_arrays_are_numbers_and_what_is_not_finite_is_null(tmp_path):
    row = pair(0, ratio=np.float32("nan"), similarity=np.float32(0.5), flipped=np.bool_(True))
    row["nearest_index"] = np.int64(3)
    counts = HISTOGRAM | {"generated": np.array([0, 1, 3, 4]), "heldout": None}
    measures = [measure(float("nan"), float("-inf"), np.float64(0.5))]
    write(tmp_path, REPORT | {"measures": measures, "histograms": [counts]}, [row])
    written = read_json(tmp_path / "report.json")
    assert [written["measures"][0][key] for key in ("value", "low", "high")] == [None, None, 0.5]
    assert written["histograms"][0]["generated"] == [0, 1, 3, 4]
    (read,) = parquet.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert read == row | {"ratio": None}


def test_same_input_same_files(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    pages = ["report.html", "report.json", "report_public.html"]
    assert names == ["images.parquet", "pairs.parquet", *pages]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_an_error_leaves_the_earlier_report(tmp_path):
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(IndexError):
        write(tmp_path, pairs=[pair(0, nearest_index=5)])
    with pytest.raises(ValueError, match="not-a-number"):
        write(tmp_path, pairs=[pair(0, image="not-a-number")])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_the_closest_pairs_are_shown_and_no_path(tmp_path):
    write(tmp_path, shown=3)
    page = (tmp_path / "report.html").read_text("utf-8")
    data = json.loads(Page(page).scripts[0])
    assert [pair["similarity"] for pair in data["pairs"]] == pytest.approx([0.95, 0.9, 0.85])
    assert list(data["train"]) == ["0", "1", "2"]
    assert "generations/" not in page


def test_own_image_is_where_its_similarity_is_the_largest(tmp_path):
    own = [None, 0.8, 0.8 - 1e-7, 0.79]
    rows = [pair(i, similarity=0.8, own_similarity=value) for i, value in enumerate(own)]
    data = json.loads(Page((write(tmp_path, pairs=rows) / "report.html").read_text()).scripts[0])
    assert [pair["is_own"] for pair in data["pairs"]] == [False, True, True, False]


def test_hostile_text_stays_text(tmp_path):
    page = Page((write(tmp_path) / "report.html").read_text("utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert [pair["prompt"] for pair in json.loads(page.scripts[0])["pairs"]] == PROMPTS
    assert not {"s", "b", "i"} & {tag for tag, attrs in page.tags if not attrs}
    links = {key for _, attrs in page.tags for key in attrs} & {"src", "href", "srcset"}
    assert not links


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ((0.612345, 0.58, 0.64), ("0.612", "0.580 to 0.640")),
        ((0.5, 0.49991, 0.50009), ("0.5000", "0.4999 to 0.5001")),
        ((-4.3, -5.2, -3.3), ("−4.30", "−5.20 to −3.30")),
        ((1234.5, 1100, 1390), ("1,234", "1,100 to 1,390")),
        ((0.0, 0.0, 0.0), ("0.00", "0.00 to 0.00")),
        ((48.2137,), ("48.2", "")),
        ((0.0123,), ("0.0123", "")),
        ((0.00004,), ("4.0e−05", "")),
        ((17,), ("17", "")),
        ((17.0,), ("17", "")),
        ((None,), ("–", "")),
        ((0.25, None, 0.5), ("0.250", "")),
    ],
)
def test_numbers_have_the_digits_their_interval_bears(given, shown):
    assert format_measure(measure(*given)) == shown


@pytest.mark.parametrize(
    ("given", "changes", "shown", "labels"),
    [
        ((0.25, 0.2, 0.4), {}, (20, 25, 40), ["0", "0.5", "1"]),
        ((0.1, -0.05, 0.15), {}, (37.5, 75, 87.5), ["−0.2", "0", "0.2"]),
        ((-5, -10, 5), {"better": "zero"}, (0, 25, 75), ["−10", "0", "10"]),
        ((0, 0, 0), {"better": "zero"}, (50, 50, 50), ["−1", "0", "1"]),
    ],
)
def test_bars_are_to_scale(given, changes, shown, labels):
    bar = interval_bar(measure(*given, **changes))
    assert (bar["low"], bar["value"], bar["high"]) == pytest.approx(shown)
    assert [label for _, label in bar["ticks"]] == labels
    assert [x for x, _ in bar["ticks"]] == pytest.approx([0, 50, 100])


@pytest.mark.parametrize(
    "given",
    [
        measure(0.5),
        measure(None, 0, 1),
        measure(0.5, 0.4, 0.6, section="Quality"),
        measure(0.02, 0.01, 0.03, section="Membership", name="heldout_loss"),
        measure(9, 8, 10),
    ],
)
def test_no_bar_without_interval_or_common_scale(given):
    assert interval_bar(given) is None


def test_histogram_shows_the_share_of_each_sets_images():
    plot = histogram_plot(HISTOGRAM, REPORT["measures"])
    drawn = {series["name"]: series for series in plot["series"]}
    assert list(drawn) == ["train", "heldout", "generated"]
    for name, series in drawn.items():
        steps = re.findall(r"V([\d.]+)H([\d.]+)", series["path"])
        heights = np.array([max(100 - float(y), 0) for y, _ in steps])
        assert heights / heights.sum() == pytest.approx(
            np.array(HISTOGRAM[name]) / sum(HISTOGRAM[name]), abs=1e-3
        )
        assert [float(x) for _, x in steps] == pytest.approx([25, 50, 75, 100])
        assert series["images"] == sum(HISTOGRAM[name])
    # One scale for all: the highest share is 6 of 10, and 50% is drawn at 5/6 of its height.
    assert "V4.00" in drawn["heldout"]["path"]
    assert dict(map(reversed, plot["y_ticks"]))["40%"] == pytest.approx(100 - 96 * 4 / 6)
    assert [label for _, label in plot["x_ticks"]] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert drawn["generated"]["p95"] == (pytest.approx(61), "0.610")
    assert drawn["heldout"]["p95"][0] == pytest.approx(40)
    assert drawn["train"]["p95"] is None
    assert plot["bins"][1]["text"].splitlines() == [
        "0.25 to 0.5",
        "Generated: 1 (12.5%)",
        "Held-out: 6 (60.0%)",
        "Train–train: 10 (50.0%)",
    ]


def test_histogram_without_heldout_images_or_of_nothing():
    plot = histogram_plot(HISTOGRAM | {"heldout": None, "generated": [0, 0, 0, 0]}, [])
    assert [series["name"] for series in plot["series"]] == ["train", "generated"]


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
