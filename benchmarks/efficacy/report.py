"""RESULTS.md, its pages and pictures, from the results alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.efficacy import results as files
from benchmarks.efficacy.answers import answers, best
from benchmarks.efficacy.cell import FINER
from benchmarks.efficacy.frechet import frechet_table, known_frechet
from benchmarks.efficacy.glance import GOAL, Goal, goal_table, goals, lines
from benchmarks.efficacy.pages import (
    PICTURES,
    closest_pairs,
    comparisons_page,
    lower_rate_place,
    main_picture,
    parts_page,
    place_page,
    rates_page,
)
from benchmarks.efficacy.parts import ABOUT, Finding, findings, parts_table
from benchmarks.efficacy.places import Place, Results, places, rate_of
from benchmarks.efficacy.protocol import Protocol
from benchmarks.efficacy.results import SHOWN_SEED, Result
from benchmarks.efficacy.skipped import Skips, known_skips, skipped_table
from benchmarks.efficacy.study import (
    AT_LOWER_RATE,
    LOWER_RATES,
    RATES,
    SEEDS,
    STUDIES,
    TUNING_SEED,
    WEIGHTS,
    tuning_cell,
)
from benchmarks.efficacy.study import cells as cells_of
from benchmarks.efficacy.tables import MEAN_OF_LEVELS, as_table, interval, scalar
from benchmarks.efficacy.unseen import Unseen, course_table, difference_table, known_unseen

PAGES = "tables"


def write(results: Path, output: Path, protocol: Protocol) -> Path:
    """Write RESULTS.md, pages and pictures into ``output``."""
    known = files.read_all(results, protocol)
    pictures, pages = output / PICTURES, output / PAGES
    for folder, kind in ((pictures, "*.png"), (pages, "*.md")):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(kind):
            old.unlink()
    compared = places(known)
    found = findings(compared)
    for place in compared:
        _page(pages, place.name, place_page(place, pictures))
    _page(pages, "comparisons", comparisons_page(compared))
    _page(pages, "parts", parts_page(found))
    _page(pages, "rates", rates_page(known, pictures))
    parts = ["# Does it memorize less at equal quality?\n"]
    if any(place.paired for place in compared):
        judged, skips = goals(compared), known_skips(compared)
        unseen, frechet = known_unseen(compared), known_frechet(compared)
        short = answers(compared, found, skips, unseen, frechet)
        parts += [f"## In short\n\n{short}", _goal(judged)]
        parts += [_curves(compared), _closest(compared, judged, pictures)]
        parts += [_parts(found), _skipped(skips), _unseen(unseen)]
        parts += [_frechet(frechet), _all_methods(compared)]
    parts += [_how(known, protocol, compared, found), _left(known, protocol)]
    path = output / "RESULTS.md"
    path.write_text("\n".join(filter(None, parts)), encoding="utf-8")
    return path


def _page(folder: Path, name: str, text: str) -> None:
    back = "\n[Back to the results](../RESULTS.md)\n"
    (folder / f"{name}.md").write_text(f"{text.rstrip()}\n{back}", encoding="utf-8")


def _goal(judged: Sequence[Goal]) -> str:
    if not judged:
        return ""
    return (
        "## The goal\n\nFor each data set first by how much less excess similarity there is than "
        f"with plain fine-tuning of as many updates ({GOAL:.1%} is asked for), then by how much "
        "less than with early stopping at equal held-out loss, as a mean over levels from 50 to "
        "100 % of the gain; and by which KID the method is surely worse than plain at equal "
        f"updates, if any.\n\n{goal_table(judged)}"
    )


def _curves(compared: Sequence[Place]) -> str:
    parts = ["## The curves\n\nLower and further left is better. Each leads to its page.\n"]
    for place in compared:
        page = f"{PAGES}/{place.name}.md"
        parts.append(f"[![{place.title}]({PICTURES}/{main_picture(place)})]({page})\n")
    return "\n".join(parts)


def _closest(compared: Sequence[Place], judged: Sequence[Goal], pictures: Path) -> str:
    """Galleries, where the pictures have been kept."""
    parts = []
    for place in compared if judged else ():
        if file := closest_pairs(place, best(judged).label, pictures):
            parts.append(f"{place.title}:\n\n![Closest pairs]({PICTURES}/{file})\n")
    if not parts:
        return ""
    text = (
        "## The closest pairs\n\nOf the pictures that plain fine-tuning and that the best method "
        "draw at the end of training those which resemble a training image most, each above that "
        f"image; seed {SHOWN_SEED}.\n"
    )
    return "\n".join([text, *parts])


def _parts(found: Sequence[Finding]) -> str:
    if not found:
        return ""
    return (
        f"## Part by part\n\nEach row is {ABOUT} *Helps*, *trades* and *hurts* are of excess "
        "similarity at equal held-out loss, "
        f"by the {MEAN_OF_LEVELS} of the gain; see above. [All numbers]({PAGES}/parts.md).\n\n"
        f"{parts_table(found)}"
    )


def _skipped(skips: Sequence[Skips]) -> str:
    if not skips:
        return ""
    return (
        "## What AGC skips\n\nHow often an image is skipped, as a share of its visits, and what "
        "goes with that: rank correlations over images, with three numbers of plain runs of the "
        "same seeds. Above 0, images that have more of it are skipped more often. Only of runs "
        f"since skips are kept with a result.\n\n{skipped_table(skips)}"
    )


def _unseen(unseen: Sequence[Unseen]) -> str:
    if not unseen:
        return ""
    return (
        "## Captions that were not trained on\n\nTraining and held-out images are of one kind, so "
        "pictures that copy training images are near the held-out ones: KID of pictures for "
        "captions that were trained on may get better by memorizing. For captions of held-out "
        "images there is nothing to copy. *Misfit*: how much more such a picture resembles other "
        "held-out images, as a mean, than that of its own caption; below 0 is a fit. All numbers "
        "are better where they are lower. First before training, at the lowest held-out loss, and "
        f"at the end.\n\n{course_table(unseen)}\nAgainst plain: after as many updates, then excess "
        f"similarity at equal quality of such pictures, as a {MEAN_OF_LEVELS} of the gain. Only of "
        f"runs since these pictures are drawn.\n\n{difference_table(unseen)}"
    )


def _frechet(known: Sequence[Place]) -> str:
    if not known:
        return ""
    return (
        "## The Fréchet distance\n\nTo held-out images, of features at length 1, as two Gaussians "
        "(FID's formula). So few pictures make it too high (new images of the kind would not have "
        "0 either), and by less where they are smoother, so that small differences say little. "
        "Of captions that were trained on, and not; at equal distance as a "
        f"{MEAN_OF_LEVELS} of the gain. Only of runs since it is read.\n\n"
        f"{frechet_table(known)}"
    )


def _all_methods(compared: Sequence[Place]) -> str:
    return (
        "## All methods\n\nReductions of excess similarity against plain fine-tuning that has "
        "spent as much; then against early stopping, as a mean over levels. "
        f"[All numbers]({PAGES}/comparisons.md); [learning rates]({PAGES}/rates.md).\n\n"
        f"{lines(compared)}"
    )


def _how(known: Results, p: Protocol, compared: Sequence[Place], found: Sequence[Finding]) -> str:
    took = sum(_train_seconds(r) + _read_seconds(r) for r in known.values())
    early = p.updates // p.rounds // FINER
    between = p.updates // p.rounds * p.aggregate_every
    return f"""## How it is measured

Written by `python -m benchmarks.efficacy report` from the {len(known)} results in `results/`, each
of `python -m benchmarks.efficacy run --study NAME`; {took / 3600:.1f} hours in all of cores that
were shared. **n** is the number of training seeds behind a row ({", ".join(map(str, SEEDS))}): with
n = 1 an interval is over prompts and images alone, and says nothing of how runs differ; with 2 or 3
it is still somewhat too narrow.

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
  such intervals one leaves it out by chance, and nothing is corrected for how many there are:
  {len(found)} words on parts, {sum(each.number == 1 for each in found)} of them of one seed (those
  are not printed bold). The words are of the mean of levels, which single levels may contradict.
- **An excess of 0 is not "nothing memorized"**: before training it is {_before(compared)}.
- Intervals of KID and of the Fréchet distance are given the held-out images, which are not drawn
  anew in them: they are narrower than those of new images would be.
- Quality is held-out loss, and KID by two embedders (pixels, and edges: `edges.py`); the Fréchet
  distance, which is biased for so few pictures, of some runs. There is no CLIP score, as no tower
  comes with the repository.
- Rates are chosen by the lowest held-out loss on seed {TUNING_SEED} of one data set, which no
  table uses but those of the rates; methods of one model have plain's. {_lowest_rates(known)}
  A row *to be run again* is of a run whose settings have changed since.
- **Chosen on these data**, and so flattered by them: the threshold, the gentle operations, and
  which method is called best. *Duplicated* has the images, prompts and held-out images of *fluent*,
  so the three data sets are two styles. Curves of shards have no reading before {between} updates.
"""


def _before(compared: Sequence[Place]) -> str:
    first = {place.setting: scalar(place.plain, "excess")[0] for place in compared}
    return ", ".join(f"{value:+.3f} on {setting}" for setting, value in first.items()) or "unknown"


def _lowest_rates(known: Results) -> str:
    """Whether tuning, where complete, has chosen an end of what it tried; what lies beyond it."""
    tuned = {key: files.tuned_rate(known, *key) for key in RATES}
    done = [key for key, rate in tuned.items() if rate]
    lowest = [key for key in done if tuned[key] == min(RATES[key])]
    found = []
    for (mode, method), rate in LOWER_RATES.items():
        if (mode, method) in lowest and (lower := tuning_cell(mode, method, rate)) in known:
            chosen = tuning_cell(mode, method, tuned[mode, method])
            (less, at, excess), (least, best, usual) = (_told(known[c]) for c in (lower, chosen))
            found.append(
                f"{method}, {WEIGHTS[mode]}: {less:.4f} after {at} updates, and not {least:.4f} "
                f"after {best}, and ends with an excess of {excess:+.3f}, and not {usual:+.3f}"
            )
    text = f"In {len(lowest)} of {len(done)} groups that is the lowest rate that was tried"
    if not found:
        return f"{text}, and a lower one may be better yet."
    return (
        f"{text}; half of it, tried since and not chosen from, reaches a held-out loss of "
        f"{'; '.join(found)} ([more](tables/rates.md)).{_at_lower_rate(known)}"
    )


def _at_lower_rate(known: Results) -> str:
    """What the winner adds to it."""
    if not (place := lower_rate_place(known)):
        return ""
    label = AT_LOWER_RATE.label
    end, equal = place.at_budget(label), place.compare(label)
    less = interval(end.reduction or end.difference, "{:.0%}" if end.reduction else "{:+.3f}")
    gain = interval(equal.area, "{:+.4f}") if equal else "never better than before training"
    return (
        f" At that rate `{label}` has {less} less excess than plain at equal updates and the same "
        f"rate, a held-out loss lower by {interval(end.better, '{:+.4f}')}, and less excess at "
        f"equal held-out loss by {gain} as a mean of levels (that seed, n = 1)."
    )


def _told(result: Result) -> tuple[float, int, float]:
    """Lowest held-out loss, after how many updates that was, and excess at the end."""
    loss, best = files.lowest_loss(result)
    excess_R = scalar({result.cell.seed: result}, "excess")
    return loss, result.column("updates")[best], excess_R[-1]


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
