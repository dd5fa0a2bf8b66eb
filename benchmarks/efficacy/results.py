"""A cell's result: one parquet file, a row a reading, and what was run in its metadata."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.efficacy.analysis import best_reading
from benchmarks.efficacy.cell import flags_of
from benchmarks.efficacy.methods import BEFORE
from benchmarks.efficacy.protocol import Protocol
from benchmarks.efficacy.study import Cell, tuning
from iet_sd.files import atomic_file

COUNTS = (
    *("steps", "updates", "scored", "skipped", "trained", "augmented", "dropped"),
    *("forward", "backward", "encoded"),
)
SHOWN_SEED = 0
"""Of the runs whose pictures are kept: the first prompts' at each reading, and at the last one
those closest to a training image."""
_PICTURES = ("pictures", "closest_pictures")
_ABOUT = b"efficacy"


@dataclass(frozen=True)
class Result:
    """What a cell measured; R readings, the first before training."""

    cell: Cell
    protocol: dict[str, Any]
    about: dict[str, Any]
    """prompts, prompt_ids, copies of each prompt's image, train_ids, heldout_similarity, flags,
    versions; since that is kept, of one model, skipped: the share of the visits to each training
    image at which it was."""
    rows: list[dict[str, Any]]

    def column(self, name: str) -> np.ndarray:
        """(R,), or (R, P) for what there is of each prompt or image."""
        return np.array([row[name] for row in self.rows])


def write(
    cell: Cell,
    protocol: Protocol,
    flags: Mapping[str, Any],
    copies: Mapping[str, int],
    skips: Mapping[str, int],
    folder: Path,
    results: Path,
) -> Path:
    """Write what a finished run left in ``folder``; the file appears whole.

    ``copies`` and ``skips`` of each training image, all rows of it together.
    """
    about = json.loads((folder / "readings" / "about.json").read_text())
    about["copies"] = [copies[name] for name in about["prompt_ids"]]
    about["flags"] = {name: _as_json(value) for name, value in flags.items()}
    about["versions"] = {name: version(name) for name in ("torch", "diffusers", "numpy")}
    lines = [json.loads(line) for line in (folder / "output/metrics.jsonl").open()]
    readings = {
        int(path.stem.removeprefix("round-")): json.loads(path.read_text())
        for path in (folder / "readings").glob("round-*.json")
    }
    rows = rows_of(lines, readings)
    last = rows[-1]
    # Redistribution begins to count anew.
    if cell.num_shards == 1:
        visits = last["scored"] / sum(copies.values())
        about["skipped"] = [skips[name] / (visits * copies[name]) for name in about["train_ids"]]
    for row in rows:
        for name in _PICTURES:
            is_kept = cell.seed == SHOWN_SEED and (name == "pictures" or row is last)
            row[name] = [bytes.fromhex(text) for text in row[name]] if is_kept else []
    columns = {name: pa.array([row[name] for row in rows]) for name in rows[0]}
    table = pa.table({name: _small(column) for name, column in columns.items()})
    content = {"cell": cell.as_dict(), "protocol": protocol.as_dict(), "about": about}
    table = table.replace_schema_metadata({_ABOUT: json.dumps(content).encode()})
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{cell.name}.parquet"
    with atomic_file(path) as file:
        pq.write_table(table, file, compression="zstd")
    return path


def rows_of(
    lines: list[dict[str, Any]], readings: Mapping[int, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row a reading: its numbers, and the counts of all rounds up to it; pictures as text."""
    rounds = [line for line in lines if line["kind"] == "round"]
    rows = []
    for number in sorted(readings):
        done = [line for line in rounds if line["round"] <= number]
        total = {name: sum(line[name] for line in done) for name in COUNTS}
        strength = sum(line["mean_strength"] * line["augmented"] for line in done)
        rows.append(
            {
                "round": number,
                **total,
                "moved": sum(sum(line["moved"]) for line in done),
                "strength_sum": float(strength),
                "train_seconds": float(sum(line["seconds"] for line in done)),
                **readings[number],
            }
        )
    return rows


def closest(similarity_P: np.ndarray, number: int) -> list[int]:
    """The prompts whose pictures resemble a training image most, the closest first."""
    return np.argsort(-similarity_P, kind="stable")[:number].tolist()


def read(path: Path) -> Result:
    """What `write` wrote."""
    table = pq.read_table(path)
    content = json.loads(table.schema.metadata[_ABOUT])
    return Result(
        Cell.from_dict(content["cell"]), content["protocol"], content["about"], table.to_pylist()
    )


def read_all(folder: Path, protocol: Protocol) -> dict[Cell, Result]:
    """The results of one protocol, by cell."""
    found = [read(path) for path in sorted(folder.glob("*.parquet"))]
    return {r.cell: r for r in found if r.protocol == protocol.as_dict()}


def is_current(result: Result) -> bool:
    """Whether the cell would be run by the same settings today; else it is to be run again."""
    flags = flags_of(result.cell, Protocol(**result.protocol))
    then = {**BEFORE, **result.about["flags"]}
    return all(then.get(name) == _as_json(flags[name]) for name in flags)


def tuned_rate(results: Mapping[Cell, Result], mode: str, method: str) -> float | None:
    """The rate of the lowest held-out loss at any reading on the tuning seed; None if not known."""
    cells = tuning(mode, method)
    if not set(cells) <= set(results):
        return None
    return min(cells, key=lambda cell: lowest_loss(results[cell])[0]).learning_rate


def lowest_loss(result: Result) -> tuple[float, int]:
    """The lowest held-out loss since training began, and its reading."""
    loss_R = result.column("heldout_loss").mean(axis=1)
    best = best_reading(loss_R)
    return float(loss_R[best]), best


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _small(column: pa.Array) -> pa.Array:
    """Lists of numbers as float32."""
    is_list = pa.types.is_list(column.type) and pa.types.is_floating(column.type.value_type)
    return column.cast(pa.list_(pa.float32())) if is_list else column
