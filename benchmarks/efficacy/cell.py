"""One cell in a process of its own: train by the command line of `iet_sd`, and keep the readings.

    python -m benchmarks.efficacy.cell SPEC.json

What a killed process has done is in the checkpoints of its work folder; the same command goes on
from there, to the same numbers.
"""

import fcntl
import json
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.efficacy.methods import METHODS
from benchmarks.efficacy.protocol import ROOT, Protocol
from benchmarks.efficacy.study import Cell

BUSY = 75
"""Exit status where another process has the cell."""
FINER = 2
"""Rounds of one model to a round of several."""
SPEED = {"fused_adamw": True}
"""What changes no more than rounding, and so is no setting of a result."""
LORA = {"rank": 16, "lora_alpha": 32}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


def rounds_of(cell: Cell, protocol: Protocol) -> dict[str, int]:
    """Rounds, their length, and when proxies are averaged.

    For one model a round is nothing but a place to read, and there are more of them: its curve is
    what others are compared with, and most of the gain comes early.
    """
    finer = FINER if cell.num_shards == 1 else 1
    return {
        "num_rounds": protocol.rounds * finer,
        "aggregate_every": 1 if cell.num_shards == 1 else protocol.aggregate_every,
        "steps_per_round": protocol.updates
        * cell.times
        // (protocol.rounds * finer)
        // cell.num_shards,
    }


def is_read(round: int, cell: Cell, protocol: Protocol) -> bool:
    """Whether the model is measured after a round."""
    if cell.num_shards > 1:
        return round % protocol.aggregate_every == 0
    return round in (1, 2) or round % (protocol.aggregate_every * FINER) == 0


def flags_of(cell: Cell, protocol: Protocol) -> dict[str, Any]:
    """The settings of ``train_iet_sd.py`` for a cell, but for the folders."""
    flags: dict[str, Any] = {
        "resolution": protocol.resolution,
        "center_crop": True,
        "heldout_split": "test",
        "train_batch_size": protocol.batch_size,
        "num_shards": cell.num_shards,
        **rounds_of(cell, protocol),
        "learning_rate": cell.learning_rate,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": protocol.warmup,
        "seed": cell.seed,
        "mixed_precision": "no",
        "report_to": "none",
        "train_mode": cell.train_mode,
        "checkpointing_rounds": protocol.aggregate_every * (FINER if cell.num_shards == 1 else 1),
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
    }
    if cell.train_mode == "lora":
        flags |= LORA | {"lora_target_modules": LORA_TARGETS}
    return flags | dict(METHODS[cell.method].flags) | dict(cell.flags)


def argv_of(flags: Mapping[str, Any]) -> list[str]:
    """As a command line."""
    argv = []
    for name, value in flags.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            argv += [f"--{name}", *map(str, values)]
    return argv


def run(cell: Cell, protocol: Protocol, work_dir: Path, results: Path) -> int:
    """Train, measure, and write the result; the exit status. Nothing is done twice."""
    from safetensors.torch import load_file

    from benchmarks.efficacy import beyond, controls
    from benchmarks.efficacy import results as files
    from benchmarks.efficacy.encoding import encode_each_once
    from benchmarks.efficacy.readings import StudyProbe, probe_config
    from benchmarks.efficacy.settings import copies_of, prepare, skips_of
    from iet_sd import probing
    from iet_sd.cli.train import train
    from iet_sd.engine import checkpoint

    rows, once = prepare(cell.setting, protocol, work_dir)
    folder = work_dir / "cells" / f"{cell.name}-{protocol.fingerprint}"
    base = work_dir / "base" / f"{cell.setting}-{protocol.fingerprint}.json"
    probing.Probe = partial(StudyProbe, protocol, once, folder / "readings", base)
    probing.Prober._due = lambda _, event: event.aggregated and is_read(event.round, cell, protocol)
    encode_each_once()
    if swap := METHODS[cell.method].swap:
        getattr(controls if hasattr(controls, swap) else beyond, swap)()
    places = {
        "pretrained_model_name_or_path": ROOT / protocol.model,
        "train_data_dir": rows,
        "cache_dir": work_dir / "cache",
        "output_dir": folder / "output",
    }
    flags = flags_of(cell, protocol) | probe_config(protocol)
    status = train(argv_of(places | SPEED | flags))
    if status == 0:
        last = checkpoint.find(folder / "output", "latest")
        skips_N = load_file(last.folder / "samples.safetensors")["skips"].tolist()
        skips = skips_of(rows, skips_N)
        files.write(cell, protocol, flags, copies_of(once), skips, folder, results)
        shutil.rmtree(folder)
    return status


def main(spec: str) -> int:
    """Run the cell of a file: cell, protocol, work_dir, results."""
    values = json.loads(Path(spec).read_text())
    cell, protocol = Cell.from_dict(values["cell"]), Protocol(**values["protocol"])
    work_dir = Path(values["work_dir"])
    with (work_dir / f"{cell.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{cell.name} is being run by another process")
            return BUSY
        return run(cell, protocol, work_dir, Path(values["results"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
