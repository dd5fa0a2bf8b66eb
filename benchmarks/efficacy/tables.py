"""From results to what the report shows: curves, numbers of a reading, and Markdown tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks.efficacy.analysis import LEVELS, Comparison, Curves, between, verdict
from benchmarks.efficacy.cell import LORA, LORA_TARGETS
from benchmarks.efficacy.protocol import ROOT
from benchmarks.efficacy.results import Result
from benchmarks.throughput.arithmetic import Work
from benchmarks.throughput.pipeline import count_work
from iet_sd.evaluation.membership import membership_auc
from iet_sd.evaluation.statistics import Estimate

HEADLINE = 2
"""Of `analysis.LEVELS`: 95 % of the gain."""
MEAN_OF_LEVELS = "mean of 50 to 100%"
"""What `analysis.Comparison.area` is."""
Seeds = Mapping[int, Result]
"""One method's results, by seed."""
BY_PROMPT = {"kid_edges": "KID (edges)", "kid_pixels": "KID (pixels)"}
"""Of pictures drawn for captions that were trained on."""
UNSEEN = {
    "kid_unseen_edges": "KID (edges) of unseen captions",
    "kid_unseen_pixels": "KID (pixels) of unseen captions",
    "misfit_edges": "misfit (edges) to unseen captions",
    "misfit_pixels": "misfit (pixels) to unseen captions",
}
"""Of pictures drawn for captions of held-out images; see `readings.Compared.measure_unseen`."""
FRECHET = {"frechet_edges": "FD (edges)", "frechet_pixels": "FD (pixels)"}
FRECHET_UNSEEN = {
    "frechet_unseen_edges": "FD (edges) of unseen captions",
    "frechet_unseen_pixels": "FD (pixels) of unseen captions",
}
"""The Fréchet distance: of pictures for captions that were trained on, and not."""
TITLES = {"heldout_loss": "held-out loss"} | BY_PROMPT | UNSEEN | FRECHET | FRECHET_UNSEEN
"""Measures of quality, with a number for each prompt or held-out image; lower is better."""


@dataclass(frozen=True)
class Measure:
    """A sign of memorization, with a value for each prompt, or for some of them."""

    title: str
    of_RP: Callable[[Result], np.ndarray]
    against_heldout: bool = False
    percentile: float | None = None
    """In place of the mean over prompts."""


def _excess(embedder: str) -> Callable[[Result], np.ndarray]:
    return lambda result: (
        result.column(f"similarity_{embedder}")
        - np.mean(result.about["heldout_similarity"][embedder])
    )


def _over_p95(result: Result) -> np.ndarray:
    """Whose 95th percentile is the excess of that of similarity."""
    heldout = np.percentile(result.about["heldout_similarity"]["pixels"], 95)
    return result.column("similarity_pixels") - heldout


def is_often(result: Result) -> np.ndarray:
    """Whether the training image of each prompt is there several times: (P,)."""
    return np.array(result.about["copies"]) > 1


def _excess_often(result: Result) -> np.ndarray:
    return _excess("pixels")(result)[:, is_often(result)]


MEASURES = {
    "excess": Measure("excess similarity (pixels)", _excess("pixels")),
    "p95": Measure("excess p95, the paper's score (pixels)", _over_p95, percentile=95),
    "often": Measure("excess similarity of images shown often (pixels)", _excess_often),
    "excess_edges": Measure("excess similarity (edges)", _excess("edges")),
    "own": Measure("own-image share", lambda r: r.column("is_own_pixels").astype(float)),
    "copies": Measure("l2 copies", lambda r: (r.column("l2_ratio") < 1).astype(float)),
    "gap": Measure("loss gap", lambda r: -r.column("train_loss"), against_heldout=True),
}


def curves_of(runs: Seeds, measure: str, quality: str = "heldout_loss") -> Curves:
    """The curves of a method's runs; ``quality`` is one of `TITLES`."""
    seeds, found = tuple(sorted(runs)), MEASURES[measure]
    return Curves(
        seeds,
        np.stack([runs[seed].column(quality) for seed in seeds]),
        np.stack([found.of_RP(runs[seed]) for seed in seeds]),
        found.against_heldout,
        by_prompt=quality in BY_PROMPT | FRECHET,
        percentile=found.percentile,
    )


def having(runs: Seeds, name: str) -> Seeds:
    """The runs of which a number of each image is known: readings have come to say more."""
    return {seed: run for seed, run in runs.items() if name in run.rows[0]}


def scalar(runs: Seeds, name: str) -> np.ndarray:
    """A number of each reading, as a mean over seeds: (R,)."""
    return np.mean([NUMBERS[name](run) for run in runs.values()], axis=0)


def _mean(measure: str) -> Callable[[Result], np.ndarray]:
    return lambda result: curves_of({0: result}, measure).mean[1]


def compute(result: Result) -> np.ndarray:
    """FLOP of the UNet's and the VAE's passes in training, up to each reading: (R,)."""
    work = _work(result.protocol["model"], result.protocol["resolution"], result.cell.train_mode)
    passes = {"forward": work.unet, "backward": work.backward, "encoded": work.vae}
    return sum(float(flop) * result.column(name) for name, flop in passes.items())


@cache
def _work(model: str, resolution: int, train_mode: str) -> Work:
    lora = LORA | {"lora_target_modules": LORA_TARGETS} if train_mode == "lora" else {}
    return count_work(ROOT / model, resolution, train_mode, **lora)


def _share(part: str, whole: str) -> Callable[[Result], np.ndarray]:
    return lambda result: result.column(part) / np.maximum(result.column(whole), 1)


NUMBERS: dict[str, Callable[[Result], np.ndarray]] = {
    "updates": lambda r: r.column("updates"),
    "trained": lambda r: r.column("trained"),
    "passes": lambda r: r.column("forward") + r.column("backward"),
    "compute": compute,
    **{name: _mean(name) for name in MEASURES},
    "authentic": lambda r: r.column("authentic_pixels").mean(axis=1),
    "auc": lambda r: np.array(
        [
            membership_auc(np.array(train), np.array(heldout))
            for train, heldout in zip(r.column("train_loss"), r.column("heldout_loss"), strict=True)
        ]
    ),
    **{name: lambda r, n=name: r.column(n).mean(axis=1) for name in TITLES},
    "skip_rate": _share("skipped", "scored"),
    "augmented": _share("augmented", "trained"),
    "seconds": lambda r: r.column("train_seconds"),
}
BUDGETS = {
    "updates": "as many updates",
    "trained": "as many samples trained",
    "compute": "as much compute",
}
"""What may be spent alike, by names of `NUMBERS`."""
_COLUMNS = (
    ("updates", "updates", "{:.0f}"),
    ("trained", "samples trained", "{:,.0f}"),
    ("passes", "UNet passes", "{:,.0f}"),
    ("skip_rate", "skipped", "{:.0%}"),
    ("augmented", "augmented", "{:.0%}"),
    ("heldout_loss", "held-out loss", "{:.4f}"),
    ("kid_pixels", "KID pixels", "{:.4f}"),
    ("kid_edges", "KID edges", "{:.4f}"),
    ("p95", "excess p95", "{:+.3f}"),
    ("excess", "excess mean", "{:+.3f}"),
    ("excess_edges", "excess mean, edges", "{:+.3f}"),
    ("own", "own image", "{:.0%}"),
    ("copies", "l2 copies", "{:.0%}"),
    ("authentic", "AuthPct", "{:.0%}"),
    ("gap", "loss gap", "{:+.4f}"),
    ("auc", "AUC", "{:.2f}"),
)


def readings_table(
    methods: Mapping[str, Seeds], reading: Callable[[np.ndarray], int], base: bool = False
) -> str:
    """A row a method, at the reading that ``reading`` says, by its held-out losses.

    base: first a row of the model before training.
    """
    head = ["method", "n", "rate", *(title for _, title, _ in _COLUMNS)]
    rows = [head, ["---"] * len(head)]
    shown = {"before training": (next(iter(methods.values())), 0)} if base else {}
    for label, runs in methods.items():
        shown[label] = runs, reading(scalar(runs, "heldout_loss"))
    for label, (runs, at) in shown.items():
        rate = next(iter(runs.values())).cell.learning_rate
        about = ["", ""] if label == "before training" else [str(len(runs)), f"{rate:g}"]
        numbers = [form.format(scalar(runs, name)[at]) for name, _, form in _COLUMNS]
        rows.append([label, *about, *numbers])
    return as_table(rows)


def comparison_table(
    plain: Seeds,
    methods: Mapping[str, Seeds],
    found: Mapping[str, Comparison | None],
    quality: str,
    other: str,
) -> str:
    """A row a method: how much less it memorizes than plain at each level, and as a mean over them.

    Beside that, at the level of `HEADLINE`: quality, plain, the method, the reduction, what
    ``other``, another measure of quality, is where each curve is then, and a word; and by how much
    the method's best quality is better than plain's.
    """
    shares = [f"{share:.0%}" for share in LEVELS]
    at = shares[HEADLINE]
    head = ["method", "n", *(f"less by, at {share}" for share in shares), MEAN_OF_LEVELS]
    head += [f"{TITLES[quality]} at {at}", "plain there", "method there", "reduction"]
    head += [f"{TITLES[other]}: plain, method", "memorizes"]
    head += [f"best {TITLES[quality]} is lower by"]
    rows = [head, ["---"] * len(head)]
    for label, comparison in found.items():
        if comparison is None:
            never = "never better than before training"
            rows.append([label, *[""] * (len(head) - 3), never, ""])
            continue
        level = comparison.levels[HEADLINE]
        differences = [each.difference for each in comparison.levels]
        runs = [{s: each[s] for s in comparison.seeds} for each in (plain, methods[label])]
        rows.append(
            [
                label,
                str(len(comparison.seeds)),
                *(interval(each, "{:+.3f}") for each in (*differences, comparison.area)),
                f"{level.quality:.4f}",
                f"{level.first.value:+.3f}",
                f"{level.second.value:+.3f}",
                interval(level.reduction, "{:.0%}"),
                ", ".join(
                    f"{at_place(*pair, other):.3f}" for pair in zip(runs, level.places, strict=True)
                ),
                verdict(level.difference),
                interval(comparison.best, "{:+.4f}"),
            ]
        )
    return as_table(rows)


def at_place(runs: Seeds, place: float, name: str) -> float:
    """A number at a place between readings, as a mean over seeds."""
    return between(scalar(runs, name), place)


def copies_table(methods: Mapping[str, Seeds]) -> str:
    """Of images shown once and often, a row a method, at the end of training."""
    head = ["method", "n", "own image, once", "often", "excess mean, once", "often"]
    rows = [head, ["---"] * len(head)]
    for label, runs in methods.items():
        often_P = is_often(next(iter(runs.values())))
        last = {m: curves_of(runs, m).memory_SRP[:, -1] for m in ("own", "excess")}
        values = [last[m][:, chosen].mean() for m in last for chosen in (~often_P, often_P)]
        forms = ("{:.0%}", "{:.0%}", "{:+.3f}", "{:+.3f}")
        numbers = [form.format(value) for form, value in zip(forms, values, strict=True)]
        rows.append([label, str(len(runs)), *numbers])
    return as_table(rows)


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def interval(estimate: Estimate | None, form: str) -> str:
    """A number and its interval; nothing of nothing."""
    if estimate is None:
        return ""
    value, low, high = (form.format(v) for v in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"
