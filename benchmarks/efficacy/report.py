"""RESULTS.md and its pictures, from the results alone."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.efficacy import results as files
from benchmarks.efficacy.analysis import best_reading, verdict
from benchmarks.efficacy.cell import FINER
from benchmarks.efficacy.chart import Line, draw_lines, gallery
from benchmarks.efficacy.glance import at_a_glance, less_by
from benchmarks.efficacy.methods import METHODS
from benchmarks.efficacy.parts import part_by_part
from benchmarks.efficacy.places import Methods, Place, Results, age, places, rate_of
from benchmarks.efficacy.protocol import ROOT, Protocol
from benchmarks.efficacy.results import Result
from benchmarks.efficacy.study import RATES, SETTINGS, STUDIES, TUNING_SEED, Cell
from benchmarks.efficacy.study import cells as cells_of
from benchmarks.efficacy.tables import (
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
_SHOWN = ("plain", "agc", "agc_taa_gentle", "iet", "iet_agc_plus", "iet_agc_plus_gentle")
"""Methods of the first pictures; the others have some of their own, of a few each."""
_FEW = 6
_PLOTTED = (("excess", "heldout_loss"), ("gap", "heldout_loss"), ("excess", "kid_edges"))


def write(results: Path, output: Path, protocol: Protocol) -> Path:
    """Write RESULTS.md and the pictures into ``output``."""
    known = files.read_all(results, protocol)
    pictures = output / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.png"):
        old.unlink()
    compared = places(known)
    parts = [_head(known, protocol), at_a_glance(compared), part_by_part(compared)]
    parts += [_section(place, pictures) for place in compared]
    parts.append(_tuning(known, pictures))
    parts.append(_left(known, protocol))
    path = output / "RESULTS.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _head(known: Results, p: Protocol) -> str:
    took = sum(_train_seconds(r) + _read_seconds(r) for r in known.values())
    early = p.updates // p.rounds // FINER
    between = p.updates // p.rounds * p.aggregate_every
    return f"""# Does it memorize less at equal quality?

Written by `python -m benchmarks.efficacy report` from the {len(known)} results in `results/`,
{took / 3600:.1f} hours in all on cores that were shared. **n** is the number of training seeds
behind a row: with n = 1 an interval is over prompts and images alone, and says nothing of how runs
differ; with 2 or 3 it is still somewhat too narrow.

Each run fine-tunes `{p.model}` on {p.images} images at {p.resolution} px for {p.updates} updates
of {p.batch_size} samples, all proxies together, at a constant rate after {p.warmup} updates of a
proxy, so that each reading within a run is what a shorter run would have given: **plain's own curve
is early stopping**. There is a reading every {between} updates, of one model also after {early}
and {2 * early}, as most of the gain comes early: {p.prompts} captions of training images are drawn
({p.inference_steps} steps, guidance {p.guidance_scale:g}), and losses taken of as many training and
held-out images; prompts, images and noise are the same in all runs. No two images are
near-duplicates. With K shards a proxy has 1/K of the updates, unless a row says `x updates`.

- **excess**: similarity to the nearest training image, less that of held-out images; p95 is the
  paper's score. **own image**: share of pictures whose nearest training image is that of their own
  caption. **l2 copies**: the rule of Carlini et al. **loss gap**: held-out less training loss.
  **AUC**: of membership by loss.
- **equal quality**: at the same held-out loss. Levels are shares of the gain from the model before
  training to the best loss that both methods reach; at each, the least memorization that a curve
  has there. A method memorizes *less* or *more* where the 95 % interval leaves out 0; of twenty
  such intervals one leaves it out by chance.
- Rates are chosen by the lowest held-out loss on seed {TUNING_SEED}, which no table uses but those
  of the rates. A row *to be run again* is of a run whose settings have changed since.
"""


def _section(place: Place, pictures: Path) -> str:
    weights = {"full": "all weights", "lora": "LoRA"}[place.mode]
    name, methods = f"{place.setting}-{place.mode}", place.methods
    parts = [f"## {SETTINGS[place.setting]}, {weights}\n", _does_plain(place.plain)]
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
        parts += _compared(place, "###", _OFTEN)
    parts += _compared(place, "###")
    parts.append("### At the end of training: equal updates, not equal quality\n")
    parts.append(readings_table(methods, lambda loss_R: len(loss_R) - 1, base=True))
    if place.setting == "duplicated":
        parts.append("### Images shown once, and those shown often, at the end of training\n")
        parts.append(copies_table(methods))
    parts.append("### At each method's lowest held-out loss\n")
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
            word = "less, with worse pictures"
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
    return f"![{title} against {other}]({PICTURES}/{path})\n"


def _gallery(place: Place, methods: Methods, pictures: Path) -> str:
    """The first prompts, drawn by each method at its lowest held-out loss and at the end."""
    first = next(iter(place.plain.values()))
    rows = [("before training", _pictures(first, 0))]
    if place.setting != "twemoji":  # which are not shipped
        rows.insert(0, ("training image", _training_images(first, len(rows[0][1]))))
    for label, runs in methods.items():
        if 0 not in runs:
            continue
        best = best_reading(scalar({0: runs[0]}, "heldout_loss"))
        for when, at in (("lowest held-out loss", best), ("end", len(runs[0].rows) - 1)):
            updates = runs[0].rows[at]["updates"]
            rows.append((f"{label}\n{when}, {updates} updates", _pictures(runs[0], at)))
    sheet = gallery(rows, first.about["prompts"][: len(rows[-1][1])])
    name = f"{place.setting}-{place.mode}-gallery.png"
    sheet.save(pictures / name)
    return f"The first prompts, seed 0:\n\n![Pictures of each method]({PICTURES}/{name})\n"


def _training_images(result: Result, count: int) -> list[Image.Image]:
    """Of the first prompts, from ``demo/data``."""
    table = pq.read_table(ROOT / "demo" / "data" / "train-00000-of-00001.parquet")
    names, images = table["sample_id"].to_pylist(), table["image"]
    rows = [names.index(name) for name in result.about["prompt_ids"][:count]]
    return [Image.open(io.BytesIO(images[row].as_py()["bytes"])).convert("RGB") for row in rows]


def _pictures(result: Result, at: int) -> list[Image.Image]:
    return [Image.open(io.BytesIO(each)).convert("RGB") for each in result.rows[at]["pictures"]]


def _tuning(known: Results, pictures: Path) -> str:
    """Rates, and what the tuning seed shows."""
    parts = [f"## Learning rates (seed {TUNING_SEED})\n"]
    for mode in ("full", "lora"):
        rows = [["tuned", "rate", "lowest held-out loss", "after updates", "chosen"], ["---"] * 5]
        methods: Methods = {}
        for (of, method), rates in RATES.items():
            for rate in rates if of == mode else ():
                cell = Cell("fluent", mode, method, rate, TUNING_SEED, METHODS[method].num_shards)
                if cell not in known:
                    continue
                runs = {TUNING_SEED: known[cell]}
                loss_R = scalar(runs, "heldout_loss")
                best = best_reading(loss_R)
                chosen = files.tuned_rate(known, mode, method) == rate
                updates = f"{scalar(runs, 'updates')[best]:.0f}"
                word = "yes" if chosen else ""
                rows.append([method, f"{rate:g}", f"{loss_R[best]:.4f}", updates, word])
                methods[f"{method} {rate:g}{age(known[cell])}"] = runs
        if methods:
            parts += [f"### {mode}\n", as_table(rows)]
            parts += [_picture(f"tuning-{mode}", methods, m, pictures, q) for m, q in _PLOTTED]
            parts.append(_tuning_comparison(known, mode, methods))
            parts += ["At the end of training:\n"]
            parts += [readings_table(methods, lambda loss_R: len(loss_R) - 1, base=True)]
    return "\n".join(parts) if len(parts) > 1 else ""


def _tuning_comparison(known: Results, mode: str, methods: Methods) -> str:
    """At equal held-out loss against plain's best rate so far: a first look, of one seed."""
    plain = {label: runs for label, runs in methods.items() if label.startswith("plain ")}
    if not plain or len(plain) == len(methods):
        return ""
    best = min(plain, key=lambda label: scalar(plain[label], "heldout_loss")[1:].min())
    others = {label: runs for label, runs in methods.items() if label != best}
    place = Place("fluent", mode, plain[best], others)
    text = f"A first look, one seed, the one that rates are chosen by: against {best}.\n"
    return "\n".join([text, _in_words(place), *_compared(place, "####")])


def _left(known: Results, protocol: Protocol) -> str:
    """What is missing, and how long it takes by what was measured."""
    found = known.values()
    train = np.mean([_train_seconds(r) / r.cell.times for r in found]) if known else np.nan
    read = np.mean([_read_seconds(r) for r in found]) if known else np.nan
    rows = [["study", "cells", "done", "hours of a core left"], ["---"] * 4]
    for study in STUDIES:
        wanted = cells_of(study, lambda mode, method: rate_of(known, mode, method))
        left = [c for c in wanted if c not in known or not files.is_current(known[c])]
        hours = sum(train * cell.times + read for cell in left) / 3600
        done = str(len(wanted) - len(left))
        rows.append([f"`{study}`", str(len(wanted)), done, f"{hours:.1f}"])
    return (
        "## What is left\n\n"
        f"A cell took {train:.0f} s to train and {read:.0f} s to read, on average, on cores that "
        "were shared. `python -m benchmarks.efficacy run --study NAME` goes on; `--list` names the "
        f"cells.\n\n{as_table(rows)}"
    )


def _train_seconds(result: Result) -> float:
    return float(result.rows[-1]["train_seconds"])


def _read_seconds(result: Result) -> float:
    """Without that before training, which all cells of a setting share."""
    return float(sum(result.column("read_seconds")[1:]))


assert set(MEASURES) <= set(NUMBERS)
