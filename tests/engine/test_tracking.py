"""metrics.jsonl: the numbers people ask for, and exactly the rounds that were done."""

import json

import pytest

from iet_sd.engine.rounds import RoundDone, ShardDone, StepDone
from iet_sd.engine.step import Counts
from iet_sd.engine.tracking import MetricsFile, rates, table

ASKED_FOR = {
    "round",
    "loss",
    "skip_rate",
    "mean_strength",
    "share_augmented",
    "moved",
    "updates",
    "scored",
    "trained",
    "forward",
    "backward",
    "encoded",
    "seconds",
    "peak_memory",
}


def counts(scale=1):
    """Two steps of four samples: 2 skipped, 5 trained (3 of them augmented), 1 dropped."""
    return Counts(
        steps=2 * scale,
        updates=2 * scale,
        scored=8 * scale,
        skipped=2 * scale,
        trained=5 * scale,
        augmented=3 * scale,
        dropped=1 * scale,
        forward=11 * scale,
        backward=7 * scale,
        encoded=11 * scale,
        loss_sum=4.0 * scale,
        strength_sum=1.2 * scale,
    )


def round_done(number, moved=(3, 1)):
    shards = [
        ShardDone(number, 0, 9, counts(), 1e-4, seconds=1.5, peak_memory=100),
        ShardDone(number, 1, 7, counts(scale=3), 2e-4, seconds=2.5, peak_memory=300),
    ]
    return RoundDone(number, shards, True, list(moved), None, seconds=4.5)


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ratios_by_hand():
    assert rates(counts()) == {
        "loss": 0.5,
        "skip_rate": 0.25,
        "share_augmented": 0.6,
        "mean_strength": pytest.approx(0.4),
    }


def test_ratios_of_nothing_are_zero():
    assert set(rates(Counts()).values()) == {0.0}


def test_lines_of_shards_and_round(tmp_path):
    path = tmp_path / "metrics.jsonl"
    returned = MetricsFile(path, []).add(round_done(1))
    lines = written(path)
    assert lines == returned
    assert [(line["kind"], line.get("shard")) for line in lines] == [
        ("shard", 0),
        ("shard", 1),
        ("round", None),
    ]
    for line in lines:
        assert line.keys() >= ASKED_FOR
    first, second, total = lines
    assert [line["size"] for line in (first, second)] == [9, 7]
    assert [line["learning_rate"] for line in (first, second)] == [1e-4, 2e-4]
    assert (first["moved"], second["moved"], total["moved"]) == (3, 1, [3, 1])
    assert (first["seconds"], second["seconds"], total["seconds"]) == (1.5, 2.5, 4.5)
    assert (first["peak_memory"], total["peak_memory"]) == (100, 300)
    assert total["aggregated"] is True


def test_the_round_is_the_sum_of_its_shards_and_ratios_are_of_sums(tmp_path):
    event = round_done(1)
    event.shards[1].counts.skipped = 24  # all of them: the mean of the rates would be 0.625
    first, second, total = MetricsFile(tmp_path / "metrics.jsonl", []).add(event)
    for key in ("steps", "updates", "scored", "skipped", "trained", "augmented", "dropped"):
        assert total[key] == first[key] + second[key]
    for key in ("forward", "backward", "encoded"):
        assert total[key] == first[key] + second[key]
    assert total["skip_rate"] == 26 / 32
    assert total["loss"] == 16 / 32
    assert event.shards[0].counts == counts(), "adding up has changed a shard's counts"


def test_lines_of_a_real_run(train, tmp_path):
    """The counts of an event fit each other, and the moves those of the membership."""
    # One bin and the mean itself as threshold: about half of the samples are skipped.
    skipping = {"agc_threshold": 1.0, "bank_bins": 1, "score_pass": "train"}
    _, events = train(num_shards=2, num_rounds=3, steps_per_round=4, **skipping)
    metrics = MetricsFile(tmp_path / "metrics.jsonl", [])
    rounds = [event for event in events if isinstance(event, RoundDone)]
    for event in rounds:
        metrics.add(event)
    lines = written(tmp_path / "metrics.jsonl")
    steps = sum(isinstance(event, StepDone) for event in events)
    assert sum(line["steps"] for line in lines if line["kind"] == "round") == steps
    for line in lines:
        assert line["scored"] == 4 * line["steps"]
        assert line["trained"] == line["scored"] - line["skipped"] - line["dropped"]
        assert line["forward"] == line["encoded"] == line["scored"] + line["augmented"]
        assert 0 <= line["skip_rate"] <= 1
    sizes = {(line["round"], line["shard"]): line for line in lines if line["kind"] == "shard"}
    moved = [line["moved"] for line in sizes.values()]
    assert sum(moved) > 0
    for (number, shard), line in sizes.items():
        if number < 3:
            arrived = sizes[number, 1 - shard]["moved"]
            assert sizes[number + 1, shard]["size"] == line["size"] - line["moved"] + arrived


LEFT = {
    "nothing": None,
    "no lines": "",
    "half of a line": '{"kind": "shard", "round": 1, "sh',
    "lines of a round that is done again": '{"kind": "round", "round": 3}\n',
}


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
def test_going_on_writes_exactly_the_rounds_done(done, left, tmp_path):
    """Whatever a killed run has left: a file cut off anywhere, lines too many, none."""
    path, whole = tmp_path / "metrics.jsonl", tmp_path / "whole.jsonl"
    history = [round_done(number) for number in (1, 2, 3)]
    metrics = MetricsFile(whole, [])
    for event in history:
        metrics.add(event)
    if left is not None:
        path.write_text(left)
    again = MetricsFile(path, history[:done])
    assert again.lines == written(path) == metrics.lines[: 3 * done]
    for event in history[done:]:
        again.add(event)
    assert path.read_bytes() == whole.read_bytes()
    assert again.lines == metrics.lines


def test_table_has_a_row_a_round(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", [])
    lines = [line for number in (1, 2) for line in metrics.add(round_done(number))]
    head, *rows = table(lines).splitlines()
    assert len(rows) == 2
    # round, loss, skipped, augmented, strength, moved, updates, trained, seconds
    assert rows[1].split() == ["2", "0.500", "25.0%", "60.0%", "0.40", "4", "8", "20", "4.5"]
    assert len(head.split()) == len(rows[1].split())
    assert {len(row) for row in rows} == {len(head)}
