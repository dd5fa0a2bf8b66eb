"""metrics.jsonl: what every shard did in every round, one JSON object a line.

Per round: one line a shard (``"kind": "shard"``), one for the round (``"kind": "round"``), and one
of what was measured after it, if anything was (``"kind": "probe"``, from round 0 on). At the end
the round to keep (``"kind": "recommendation"``).
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iet_sd.engine.rounds import RoundDone, ShardDone
from iet_sd.engine.step import Counts
from iet_sd.files import write_text_atomic


def rates(counts: Counts) -> dict[str, float]:
    """The ratios people ask for: mean loss, skip rate, share augmented, mean strength."""
    return {
        "loss": counts.loss_sum / max(counts.scored, 1),
        "skip_rate": counts.skipped / max(counts.scored, 1),
        "share_augmented": counts.augmented / max(counts.trained, 1),
        "mean_strength": counts.strength_sum / max(counts.augmented, 1),
    }


def shard_line(event: ShardDone, moved: int) -> dict[str, Any]:
    """The line of one shard, which ``moved`` samples left at the end of the round.

    ``loss`` is over all scored samples, unweighted.
    """
    counts = asdict(event.counts)
    del counts["loss_sum"], counts["strength_sum"]
    return {
        "kind": "shard",
        "round": event.round,
        "shard": event.shard,
        "size": event.size,
        **rates(event.counts),
        **counts,
        "moved": moved,
        "learning_rate": event.learning_rate,
        "seconds": event.seconds,
        "peak_memory": event.peak_memory,
    }


def round_line(event: RoundDone) -> dict[str, Any]:
    """The line of one round: sums and ratios over its shards."""
    total = Counts()
    for shard in event.shards:
        total += shard.counts
    counts = asdict(total)
    del counts["loss_sum"], counts["strength_sum"]
    return {
        "kind": "round",
        "round": event.round,
        **rates(total),
        **counts,
        "aggregated": event.aggregated,
        "moved": event.moved_K,
        "lora_gap": event.lora_gap,
        "seconds": event.seconds,
        "peak_memory": max(shard.peak_memory for shard in event.shards),
    }


def round_lines(event: RoundDone) -> list[dict[str, Any]]:
    """The lines of a round: one a shard, then its own."""
    shards = [shard_line(shard, event.moved_K[shard.shard]) for shard in event.shards]
    return [*shards, round_line(event)]


class MetricsFile:
    """Appends the lines of a round at once; for the main process only."""

    def __init__(
        self, path: Path, history: Sequence[RoundDone], probes: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Write the lines of the rounds that are done, and of no others; ``probes`` are lines."""
        self._path = path
        lines = [line for event in history for line in round_lines(event)]
        # The sort is stable: a probe comes after its round.
        self.lines = sorted([*lines, *probes], key=lambda line: line["round"])
        """All that is in the file."""
        write_text_atomic(path, _text(self.lines))

    def add(self, event: RoundDone) -> list[dict[str, Any]]:
        """Write the round's lines, and return them."""
        lines = round_lines(event)
        self.append(*lines)
        return lines

    def append(self, *lines: dict[str, Any]) -> None:
        """Write further lines."""
        with self._path.open("a") as file:
            file.write(_text(lines))
            file.flush()
            os.fsync(file.fileno())
        self.lines += lines


def _text(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def table(lines: list[dict[str, Any]]) -> str:
    """The rounds as a text table, one row a round."""
    head = "round   loss  skipped  augmented  strength  moved  updates  trained  seconds"
    rows = [
        f"{line['round']:5d}  {line['loss']:.3f}  {line['skip_rate']:7.1%}"
        f"  {line['share_augmented']:9.1%}  {line['mean_strength']:8.2f}  {sum(line['moved']):5d}"
        f"  {line['updates']:7d}  {line['trained']:7d}  {line['seconds']:7.1f}"
        for line in lines
        if line["kind"] == "round"
    ]
    return "\n".join([head, *rows])
