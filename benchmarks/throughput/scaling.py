"""How time and memory grow with the data, the shards and the resolution, one of them at a time.

Rows b and d at 1, 2 and 4 times as many images, shards, and pixels a side; b has one shard always.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.throughput import tables
from benchmarks.throughput.arithmetic import Steady, ratios, spread, steady
from benchmarks.throughput.measure import Bench
from benchmarks.throughput.pipeline import build_images
from benchmarks.throughput.rows import ROWS, SCALED, Setting


class Point(NamedTuple):
    """A row at a size."""

    axis: str
    factor: int
    row: str
    setting: Setting


def points(
    base: Setting, images: int, factors: Sequence[int], folder: Path
) -> Iterator[tuple[Point, int]]:
    """Every point, with how many images it has; the data's folders are named, not made."""
    for axis in ("images", "shards", "resolution"):
        for factor in factors:
            count = images * (factor if axis == "images" else 1)
            side = base.resolution * (factor if axis == "resolution" else 1)
            shards = base.num_shards * (factor if axis == "shards" else 1)
            setting = replace(
                base, data=folder / f"{count}-{side}", resolution=side, num_shards=shards
            )
            for row in SCALED:
                if axis != "shards" or ROWS[row].skips:
                    yield Point(axis, factor, row, setting), count


def scaling(
    bench: Bench,
    base: Setting,
    images: int,
    factors: Sequence[int],
    rounds: tuple[int, int],
    repeats: int,
) -> tuple[str, list[dict[str, Any]]]:
    """Measure; a table in Markdown, and what it rests on. Errors: `SystemExit`, as a run's.

    At a size that several axes have in common a row runs once.
    """
    wanted = list(points(base, images, factors, bench.work))
    found: dict[tuple[str, Setting], list[Steady]] = {}
    for point, count in wanted:
        if not point.setting.data.exists():
            build_images(point.setting.data, count, point.setting.resolution)
        found[point.row, point.setting] = []
    with tqdm(total=len(found) * (1 + 2 * repeats)) as bar:
        for repeat in range(repeats):
            for (row, setting), values in found.items():
                bar.set_description(f"Row {row}, {setting.num_shards} shards, {setting.data.name}")
                key = f"{row}-{setting.num_shards}-{setting.data.name}"
                if not repeat:  # with empty caches
                    bench.run(key, ROWS[row], setting, rounds[0])
                    bar.update()
                pair = []
                for length in rounds:
                    pair.append(bench.run(key, ROWS[row], setting, length))
                    bar.update()
                values.append(steady(*pair))
    return table([point for point, _ in wanted], found), [
        {
            "row": row,
            "images": setting.data.name.split("-")[0],
            "resolution": setting.resolution,
            "num_shards": setting.num_shards,
            "steady": [asdict(each) for each in values],
        }
        for (row, setting), values in found.items()
    ]


def table(wanted: Sequence[Point], found: dict[tuple[str, Setting], list[Steady]]) -> str:
    """Time of a trained image, peak memory and start, and as multiples of the smallest size's."""
    smallest: dict[tuple[str, str], list[Steady]] = {}
    rows = []
    for point in wanted:
        steady = found[point.row, point.setting]
        base = smallest.setdefault((point.axis, point.row), steady)
        times, of_base = ([1 / each.images_per_second for each in s] for s in (steady, base))
        peaks, least = ([each.peak for each in s] for s in (steady, base))
        rows.append(
            [
                f"{point.row}: {ROWS[point.row].title}",
                f"{point.factor} x {point.axis}",
                f"{spread([1e3 * time for time in times]):.1f}",
                f"{ratios(times, of_base):.2f}",
                f"{spread([1e3 * each.cpu_per_image for each in steady]):.1f}",
                f"{spread([peak / tables.MIB for peak in peaks]):.0f}",
                f"{ratios(peaks, least):.2f}",
                f"{spread([each.start for each in steady]):.1f}",
            ]
        )
    head = [
        "row",
        "size",
        "ms a trained image",
        "of 1 x",
        "CPU ms",
        "peak MiB",
        "of 1 x",
        "start s",
    ]
    return tables.markdown(head, rows)
