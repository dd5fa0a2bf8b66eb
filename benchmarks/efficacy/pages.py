"""Pages of tables and pictures: of each place, of the learning rates, of all comparisons."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.efficacy import results as files
from benchmarks.efficacy.analysis import best_reading, verdict
from benchmarks.efficacy.chart import Line, draw_lines, gallery
from benchmarks.efficacy.glance import GOAL, budget_table, equal_quality_table, less_by
from benchmarks.efficacy.parts import ABOUT, Finding, numbers_table
from benchmarks.efficacy.places import Methods, Place, Results, age
from benchmarks.efficacy.protocol import ROOT
from benchmarks.efficacy.results import SHOWN_SEED, Result, closest
from benchmarks.efficacy.study import (
    AT_LOWER_RATE,
    LOWER_RATES,
    RATES,
    TUNING_SEED,
    WEIGHTS,
    tuning_cell,
)
from benchmarks.efficacy.tables import (
    BUDGETS,
    HEADLINE,
    MEASURES,
    NUMBERS,
    TITLES,
    Seeds,
    as_table,
    at_place,
    comparison_table,
    copies_table,
    interval,
    readings_table,
    scalar,
)

PICTURES = "pictures"
COMPARED = (
    *((measure, "heldout_loss") for measure in ("excess", "p95", "excess_edges", "own", "gap")),
    *((measure, "kid_edges") for measure in ("excess", "own")),
    ("excess", "kid_pixels"),
)
"""Measures, and at equal what."""
_OFTEN = (("often", "heldout_loss"),)
"""The same where some images are shown often."""
_SHOWN = (
    *("plain", "agc", "agc_taa_gentle", "agc_taa_gentle, agc_threshold 0.9"),
    *("iet", "iet_agc_plus", "iet_agc_plus_gentle"),
)
"""Methods of the first pictures; the others have some of their own, of a few each."""
_FEW = 6
SHIPPED = ("fluent", "duplicated")
"""Data whose images are in ``demo/data``."""
_PLOTTED = (("excess", "heldout_loss"), ("gap", "heldout_loss"), ("excess", "kid_edges"))


def main_picture(place: Place) -> str:
    """The file of a place's first picture."""
    return f"{place.name}-{'-'.join(_PLOTTED[0])}.png"


def place_page(place: Place, pictures: Path) -> str:
    """All that there is of a place, with pictures."""
    name, methods = place.name, place.methods
    parts = [f"# {place.title}\n", _does_plain(place.plain)]
    parts.append(_in_words(place))
    main = {label: runs for label, runs in methods.items() if label in _SHOWN}
    rest = [(label, runs) for label, runs in place.others.items() if label not in _SHOWN]
    pages = {name: main}
    for start in range(0, len(rest), _FEW):
        page = f"{name}-others-{start // _FEW + 1}"
        pages[page] = {"plain": place.plain, **dict(rest[start : start + _FEW])}
    for page, chosen in pages.items():
        parts += [_picture(page, chosen, m, pictures, q) for m, q in _PLOTTED]
    if place.setting == "duplicated":
        parts += _compared(place, "##", _OFTEN)
    parts += _compared(place, "##")
    parts.append("## At the end of training: equal updates, not equal quality\n")
    parts.append(readings_table(methods, lambda loss_R: len(loss_R) - 1, base=True))
    if place.setting == "duplicated":
        parts.append("## Images shown once, and those shown often, at the end of training\n")
        parts.append(copies_table(methods))
    parts.append("## At each method's lowest held-out loss\n")
    parts.append(readings_table(methods, best_reading))
    parts.append(_gallery(place, main, pictures))
    return "\n".join(parts)


def _does_plain(plain: Seeds) -> str:
    own, copies, auc = (scalar(plain, n) for n in ("own", "copies", "auc"))
    best = best_reading(scalar(plain, "heldout_loss"))
    return (
        f"Plain fine-tuning, n = {len(plain)}: the nearest training image is the caption's own for "
        f"{own[0]:.0%} of pictures before training, {own[best]:.0%} at the lowest held-out loss "
        f"({scalar(plain, 'updates')[best]:.0f} updates) and {own[-1]:.0%} at the end; l2 copies "
        f"{copies[0]:.0%}, {copies[best]:.0%}, {copies[-1]:.0%}; membership AUC {auc[0]:.2f}, "
        f"{auc[best]:.2f}, {auc[-1]:.2f}.\n"
    )


def _in_words(place: Place) -> str:
    """A sentence a method, unflattering ones too."""
    lines = []
    for label, runs in place.paired.items():
        comparison = place.compare(label, "excess")
        if comparison is None:
            lines.append(f"- **{label}** (n = {len(runs)}): never better than before training.")
            continue
        level = comparison.levels[HEADLINE]
        pair = zip((place.plain, runs), level.places, strict=True)
        kids = [at_place(each, place, "kid_edges") for each, place in pair]
        word = verdict(level.difference)
        if word == "less" and kids[1] > kids[0]:
            word = "less, with a higher KID"
        lines.append(
            f"- **{label}** (n = {len(comparison.seeds)}): {word}. Excess "
            f"similarity {level.second.value:+.3f} against plain's {level.first.value:+.3f} at "
            f"held-out loss {level.quality:.4f}; less by {less_by(level)}. "
            f"KID (edges) there: {kids[1]:.3f} against plain's {kids[0]:.3f}. The best "
            f"held-out loss is lower by {interval(comparison.best, '{:+.4f}')}."
        )
    if not lines:
        return "Nothing to compare with plain yet.\n"
    before = scalar(place.plain, "kid_edges")[0]
    return (
        "Against early stopping, at 95 % of the gain in held-out loss that both reach. Pictures "
        "that are spoilt resemble no training image either: less is a gain only where KID is no "
        f"worse (before training: {before:.3f}).\n\n" + "\n".join(lines) + "\n"
    )


def _compared(place: Place, level: str, what: Sequence[tuple[str, str]] = COMPARED) -> list[str]:
    """Tables of measures at equal quality, each with a title of some level."""
    parts = []
    for measure, quality in what if place.paired else ():
        found = {label: place.compare(label, measure, quality) for label in place.paired}
        other = "heldout_loss" if quality == "kid_edges" else "kid_edges"
        parts.append(f"{level} At equal {TITLES[quality]}: {MEASURES[measure].title}\n")
        parts.append(comparison_table(place.plain, place.paired, found, quality, other))
    return parts


def _picture(
    name: str, methods: Methods, measure: str, pictures: Path, quality: str = "heldout_loss"
) -> str:
    lines = [
        Line(f"{label} (n = {len(runs)})", scalar(runs, measure), scalar(runs, quality))
        for label, runs in methods.items()
    ]
    title, other = MEASURES[measure].title, TITLES[quality]
    image = draw_lines(
        lines,
        f"{title[0].upper()}{title[1:]} and {other}: {name}",
        f"{title}, further left is better",
        f"{other[0].upper()}{other[1:]}, lower is better",
        "hollow: before training · a dot a reading, in the order of training · means over seeds",
    )
    path = f"{name}-{measure}-{quality}.png"
    image.save(pictures / path)
    return f"![{title} against {other}](../{PICTURES}/{path})\n"


def _gallery(place: Place, methods: Methods, pictures: Path) -> str:
    """The first prompts, drawn by each method at its lowest held-out loss and at the end."""
    first = next(iter(place.plain.values()))
    rows = [("before training", _pictures(first, 0))]
    if place.setting in SHIPPED:
        ids = first.about["prompt_ids"][: len(rows[0][1])]
        rows.insert(0, ("training image", _training_images(ids)))
    for label, runs in methods.items():
        if SHOWN_SEED not in runs:
            continue
        run = runs[SHOWN_SEED]
        best = best_reading(scalar({SHOWN_SEED: run}, "heldout_loss"))
        for when, at in (("lowest held-out loss", best), ("end", len(run.rows) - 1)):
            updates = run.rows[at]["updates"]
            rows.append((f"{label}\n{when}, {updates} updates", _pictures(run, at)))
    sheet = gallery(rows, first.about["prompts"][: len(rows[-1][1])])
    name = f"{place.name}-gallery.png"
    sheet.save(pictures / name)
    text = f"The first prompts, seed {SHOWN_SEED}:"
    return f"{text}\n\n![Pictures of each method](../{PICTURES}/{name})\n"


def closest_pairs(place: Place, label: str, pictures: Path) -> str | None:
    """The file of a gallery: pictures closest to a training image, of plain and of a method, each
    above that image; None where they are not kept."""
    rows = []
    for name in ("plain", label):
        run = place.methods.get(name, {}).get(SHOWN_SEED)
        last = run.rows[-1] if run else {}
        shown = _pictures(run, -1, "closest_pictures") if last.get("closest_pictures") else []
        if not shown or place.setting not in SHIPPED:
            return None
        chosen = closest(np.array(last["similarity_pixels"]), len(shown))
        near = [run.about["train_ids"][last["nearest_pixels"][p]] for p in chosen]
        similar = [last["similarity_pixels"][p] for p in chosen]
        about = f"{last['updates']} updates, similarity {similar[0]:.3f} to {similar[-1]:.3f}"
        rows += [(f"{name}\n{about}", shown), ("nearest training image", _training_images(near))]
    file = f"{place.name}-closest.png"
    gallery(rows, [f"{n + 1}." for n in range(len(shown))]).save(pictures / file)
    return file


def _training_images(ids: Sequence[str]) -> list[Image.Image]:
    """By their names, from ``demo/data``."""
    table = pq.read_table(ROOT / "demo" / "data" / "train-00000-of-00001.parquet")
    names, images = table["sample_id"].to_pylist(), table["image"]
    rows = [names.index(name) for name in ids]
    return [Image.open(io.BytesIO(images[row].as_py()["bytes"])).convert("RGB") for row in rows]


def _pictures(result: Result, at: int, name: str = "pictures") -> list[Image.Image]:
    return [Image.open(io.BytesIO(each)).convert("RGB") for each in result.rows[at][name]]


def rates_page(known: Results, pictures: Path) -> str:
    """Rates, and what the tuning seed shows; rates that were not chosen from come last."""
    parts = [f"# Learning rates (seed {TUNING_SEED})\n"]
    for mode in ("full", "lora"):
        rows = [["tuned", "rate", "lowest held-out loss", "after updates", "chosen"], ["---"] * 5]
        methods: Methods = {}
        tried = [(of, rate) for of, rates in RATES.items() for rate in rates]
        for of, rate in [*tried, *LOWER_RATES.items()]:
            cell = tuning_cell(*of, rate)
            if of[0] != mode or cell not in known:
                continue
            loss, best = files.lowest_loss(known[cell])
            updates = known[cell].column("updates")[best]
            chosen = "yes" if files.tuned_rate(known, *of) == rate else ""
            word = chosen if rate in RATES[of] else "tried since, not chosen from"
            rows.append([of[1], f"{rate:g}", f"{loss:.4f}", str(updates), word])
            methods[f"{of[1]} {rate:g}{age(known[cell])}"] = {TUNING_SEED: known[cell]}
        if methods:
            parts += [f"## {WEIGHTS[mode]}\n", as_table(rows)]
            parts += [_picture(f"tuning-{mode}", methods, m, pictures, q) for m, q in _PLOTTED]
            parts.append(_tuning_comparison(known, mode, methods))
            parts += ["At the end of training:\n"]
            parts += [readings_table(methods, lambda loss_R: len(loss_R) - 1, base=True)]
    if place := lower_rate_place(known):
        parts.append(
            f"## {AT_LOWER_RATE.label} and plain, both at {AT_LOWER_RATE.learning_rate:g}\n"
        )
        parts += [_in_words(place), *_compared(place, "###")]
    return "\n".join(parts)


def lower_rate_place(known: Results) -> Place | None:
    """`AT_LOWER_RATE` and plain at its rate, if both are there."""
    plain = tuning_cell("full", "plain", AT_LOWER_RATE.learning_rate)
    if not {plain, AT_LOWER_RATE} <= set(known):
        return None
    others = {AT_LOWER_RATE.label: {TUNING_SEED: known[AT_LOWER_RATE]}}
    return Place("fluent", "full", {TUNING_SEED: known[plain]}, others)


def _tuning_comparison(known: Results, mode: str, methods: Methods) -> str:
    """At equal held-out loss against plain's best rate so far: a first look, of one seed."""
    of = [f"plain {rate:g}" for rate in RATES[mode, "plain"]]
    plain = {label: methods[label] for label in of if label in methods}
    if not plain or len(methods) == 1:
        return ""
    best = min(plain, key=lambda label: scalar(plain[label], "heldout_loss")[1:].min())
    others = {label: runs for label, runs in methods.items() if label != best}
    place = Place("fluent", mode, plain[best], others)
    text = f"A first look, one seed, the one that rates are chosen by: against {best}.\n"
    return "\n".join([text, _in_words(place), *_compared(place, "###")])


def comparisons_page(places: Sequence[Place]) -> str:
    """All methods at equal quality, then where each has spent as much as plain."""
    parts = [
        "# All methods against plain fine-tuning\n\nExcess similarity (pixels), in brackets 95 % "
        "intervals.\n\n## Against early stopping, at equal quality\n\nAs a share of what plain "
        "has, where that is surely above 0.\n",
        equal_quality_table(places),
        "## Against plain fine-tuning that has spent as much\n\nAs the paper compares, by updates; "
        "and by samples trained and by compute (FLOP of UNet and VAE in training, counted), each "
        "where the one that spends less in all is at its end. *No quality surely worse*: by no "
        f"measure is the method surely worse than plain. The paper's reduction is {GOAL:.1%}.\n",
    ]
    for budget, title in BUDGETS.items():
        parts += [f"### {title[0].upper()}{title[1:]}\n", budget_table(places, budget)]
    return "\n".join(parts)


def parts_page(found: Sequence[Finding]) -> str:
    """Each part with all numbers."""
    return (
        f"# Part by part\n\nEach row is {ABOUT} Excess similarity (pixels); the best of a quality "
        f"is that which both reach.\n\n{numbers_table(found)}"
    )


assert set(MEASURES) <= set(NUMBERS)
