"""Side by side: diffusers' scripts and ours, in processes of their own, in turns (A B A B).

Every row is run for two lengths, so that rates are those of a steady state, and its first run, with
empty caches, counts for nothing but its start.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from tqdm import tqdm

from benchmarks.throughput import tables
from benchmarks.throughput.arithmetic import Run, Steady, spread, steady
from benchmarks.throughput.measure import Bench
from benchmarks.throughput.pipeline import SD15_TFLOP, count_work
from benchmarks.throughput.rows import ROWS, Setting


def compare(
    bench: Bench, setting: Setting, rows: Sequence[str], rounds: tuple[int, int], repeats: int
) -> tuple[str, dict[str, Any]]:
    """Measure; a text in Markdown, and all that it rests on. Errors: `SystemExit`, as a run's."""
    runs: dict[str, list[tuple[Run, Run]]] = {key: [] for key in rows}
    first, imports = {}, []
    bar = tqdm(total=len(rows) * (1 + 2 * repeats))

    def run(key: str, length: int) -> Run:
        bar.set_description(f"Row {key}, {setting.updates(length)} updates")
        done = bench.run(key, ROWS[key], setting, length)
        bar.update()
        return done

    with bar:
        for key in rows:
            first[key] = run(key, rounds[0])
        for _ in range(repeats):
            imports.append(bench.imports())
            for key in rows:
                runs[key].append((run(key, rounds[0]), run(key, rounds[1])))
    return summary(bench, setting, rounds, runs, first, imports)


def summary(
    bench: Bench,
    setting: Setting,
    rounds: tuple[int, int],
    runs: Mapping[str, Sequence[tuple[Run, Run]]],
    first: Mapping[str, Run],
    imports: Sequence[float],
) -> tuple[str, dict[str, Any]]:
    """The text and the record of what was measured."""
    work = count_work(setting.model, setting.resolution, setting.train_mode)
    found: dict[str, list[Steady]] = {
        key: [steady(*pair) for pair in pairs] for key, pairs in runs.items()
    }
    # Of the first runs, in which caches are made.
    starts = {key: run.start(_seconds_per_scored(found[key])) for key, run in first.items()}
    matrix_speed = bench.matrix_speed()
    what = (
        f"{setting.train_mode}, batch {setting.batch}, {setting.resolution} x "
        f"{setting.resolution}, K = {setting.num_shards}, rounds of {setting.steps} steps a proxy; "
        f"rates between {' and '.join(str(setting.updates(each)) for each in rounds)} updates, "
        f"{len(imports)} repetitions: median (least..most), ratios within a repetition. "
        f"{bench.threads} of {os.cpu_count()} cores; torch {torch.__version__}, diffusers "
        f"{diffusers.__version__}.\n"
    )
    text = "\n".join(
        [
            what,
            tables.proportions(work, SD15_TFLOP),
            tables.speed_table(found, starts, spread(imports)),
            tables.work_table(found, work, matrix_speed),
            tables.goals_table(found, imports),
        ]
    )
    record = {
        "setting": {k: v for k, v in asdict(setting).items() if not isinstance(v, Path)},
        "rounds": rounds,
        "threads": bench.threads,
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (torch, diffusers, accelerate)},
        },
        "work": asdict(work),
        "matrix_flop_per_second": matrix_speed,
        "imports_seconds": list(imports),
        "first": {key: asdict(run) for key, run in first.items()},
        "runs": {
            key: [[asdict(short), asdict(long)] for short, long in pairs]
            for key, pairs in runs.items()
        },
        "steady": {key: [asdict(each) for each in values] for key, values in found.items()},
    }
    return text, record


def write(output: Path, name: str, text: str, record: Mapping[str, Any]) -> None:
    """Print the text, and save it and the record as NAME.md and NAME.json in ``output``."""
    (output / f"{name}.md").write_text(text)
    (output / f"{name}.json").write_text(json.dumps(record, indent=1))
    print(text)


def _seconds_per_scored(found: Sequence[Steady]) -> float:
    """The median over repetitions."""
    rates = [each.images_per_second * each.counts.scored / each.counts.trained for each in found]
    return 1 / spread(rates).median
