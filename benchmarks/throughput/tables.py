"""What was measured, as Markdown. Times and rates are medians, with the least and the most."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from benchmarks.throughput.arithmetic import (
    Counts,
    Spread,
    Steady,
    Work,
    ratios,
    spread,
    work_per_image,
)
from benchmarks.throughput.rows import ROWS

MIB = 2**20
IMPORTS = "imports"
"""In place of a row: importing torch and diffusers, which takes start-up time alone."""


class Goal(NamedTuple):
    """A ratio of two rows that is wanted."""

    quantity: str
    """An attribute of `Steady`."""
    row: str
    reference: str
    bound: float
    at_least: bool

    def met(self, found: float) -> bool:
        """Whether a ratio reaches it."""
        return found >= self.bound if self.at_least else found <= self.bound


GOALS = (
    Goal("images_per_second", "b", "a", 1.3, True),
    Goal("images_per_second", "b_off", "a", 1.0, True),
    Goal("images_per_second", "d", "a", 1.0, True),
    Goal("images_per_second", "d", "e", 3.0, True),
    Goal("start", "b", IMPORTS, 1.2, False),
    Goal("start", "d", IMPORTS, 1.2, False),
    Goal("peak", "d", "b", 1.1, False),
)


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def speed_table(
    found: Mapping[str, Sequence[Steady]], first: Mapping[str, float], imports: Spread
) -> str:
    """Rates, memory and start of each row, and as ratios to row a of the same repetition.

    ``first``: seconds of the start with empty caches, by row.
    """
    head = ["row", "images/s", "of a", "updates/s", "of a", "CPU ms an image", "of a"]
    head += ["peak MiB", "of a", "start s", "of a", "first start s"]
    rows = []
    for key, steady in found.items():
        cells = [f"{key}: {ROWS[key].title}"]
        for name, unit, digits in (
            ("images_per_second", 1, 2),
            ("updates_per_second", 1, 3),
            ("cpu_per_image", 1e-3, 1),
            ("peak", MIB, 0),
            ("start", 1, 1),
        ):
            values = [getattr(each, name) for each in steady]
            cells.append(f"{spread([value / unit for value in values]):.{digits}f}")
            reference = [getattr(each, name) for each in found.get("a", ())]
            cells.append(f"{ratios(values, reference):.2f}" if reference else "")
        rows.append([*cells, f"{first[key]:.1f}"])
    return (
        markdown(head, rows) + f"\nImporting torch and diffusers' pipeline takes {imports:.1f} s. "
        "Start is all that does not grow with the updates: imports, loading, saving the result. "
        "CPU is the time of all threads, which says more than seconds where others use the cores.\n"
    )


def work_table(found: Mapping[str, Sequence[Steady]], work: Work, matrix_speed: float) -> str:
    """What each row computes for an image that it trains, counted, and at what speed."""
    head = ["row", "skipped", "augmented", "dropped", "VAE", "text", "UNet", "backward"]
    head += ["MFLOP an image", "of a", "GFLOP/s", "of a matrix product"]
    plain = work.vae + work.text + work.unet + work.backward
    rows = []
    for key, steady in found.items():
        counts = sum((each.counts for each in steady), Counts())
        per_image = work_per_image(counts, work, ROWS[key].cached)
        total = sum(per_image.values())
        rate = spread([total * each.images_per_second for each in steady])
        rows.append(
            [
                f"{key}: {ROWS[key].title}",
                f"{counts.skipped / counts.scored:.0%}",
                f"{counts.augmented / counts.trained:.0%}",
                f"{counts.dropped / counts.scored:.0%}",
                *(f"{flop / 1e6:.0f}" for flop in per_image.values()),
                f"{total / 1e6:.0f}",
                f"{total / plain:.2f}",
                f"{rate.median / 1e9:.1f}",
                f"{rate.median / matrix_speed:.0%}",
            ]
        )
    return (
        markdown(head, rows) + "\nSkipped and dropped of the scored, augmented of the trained; "
        f"FLOP of an image that is trained. One matrix product: {matrix_speed / 1e9:.1f} GFLOP/s.\n"
    )


def goals_table(found: Mapping[str, Sequence[Steady]], imports: Sequence[float]) -> str:
    """Which goals are met, of those whose rows were measured; by the median."""
    rows = []
    for goal in GOALS:
        if goal.row not in found or goal.reference not in {*found, IMPORTS}:
            continue
        values = [getattr(each, goal.quantity) for each in found[goal.row]]
        reference = (
            imports
            if goal.reference == IMPORTS
            else [getattr(each, goal.quantity) for each in found[goal.reference]]
        )
        ratio = ratios(values, reference)
        wanted = f"{'at least' if goal.at_least else 'at most'} {goal.bound}"
        what = f"{goal.quantity.replace('_', ' ')}, {goal.row} of {goal.reference}"
        rows.append([what, wanted, f"{ratio:.2f}", "met" if goal.met(ratio.median) else "missed"])
    return markdown(["goal", "wanted", "found", ""], rows)


def proportions(work: Work, reference: Mapping[str, float]) -> str:
    """The work of the networks of the pipeline, beside that of Stable Diffusion 1.5."""
    counted = asdict(work)
    here = " : ".join(f"{counted[name] / work.unet:.4g}" for name in reference)
    there = " : ".join(f"{tflop / reference['unet']:.4g}" for tflop in reference.values())
    flop = ", ".join(f"{name} {counted[name] / 1e6:.1f}" for name in reference)
    return (
        f"Forward work of an image and its caption, counted (MFLOP): {flop}; that is {here}, and "
        f"{there} in Stable Diffusion 1.5 at 512 x 512. Backward: {work.backward / 1e6:.1f}.\n"
    )
