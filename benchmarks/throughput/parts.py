"""Where the time of a step of ours goes, by `clocks`, and of rows beside each other."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from tqdm import tqdm

from benchmarks.throughput import tables
from benchmarks.throughput.clocks import REST, SCORING, UNET, Profile, clocked
from benchmarks.throughput.peer_parts import peer_profile
from benchmarks.throughput.rows import ROWS, Setting, argv_of, script_of
from iet_sd.cli.train import train
from iet_sd.engine.rounds import Trainer
from iet_sd.engine.state import RoundDone

PARTS = (
    ("data", "iet_sd.data.dataset:Loader.batches"),
    ("data", "iet_sd.data.dataset:TrainingImages.example"),
    ("data", "iet_sd.engine.second_pass:collate"),
    ("VAE, latents", "iet_sd.engine.objective:Objective.encode_images"),
    ("text", "iet_sd.engine.objective:Objective.encode_captions"),
    ("noise, loss", "iet_sd.engine.objective:Objective.prepare"),
    ("noise, loss", "iet_sd.engine.objective:Objective.select"),
    ("noise, loss", "iet_sd.engine.objective:Objective.loss_of"),
    (UNET, "diffusers:UNet2DConditionModel.forward"),
    ("backward", "iet_sd.engine.proxy:Proxy.backward"),
    ("optimizer", "iet_sd.engine.proxy:Proxy.clip_gradient"),
    ("optimizer", "iet_sd.engine.proxy:Proxy.update"),
    ("optimizer", "iet_sd.engine.proxy:Proxy.update_with_zero_gradient"),
    ("method", "iet_sd.engine.step:decide"),
    ("method", "iet_sd.engine.step:take"),
    ("method", "iet_sd.engine.step:take_or_drop"),
    ("method", "iet_sd.method.taa:magnitudes"),
    ("rest of a step", "iet_sd.engine.rounds:accumulate_gradient"),
    ("proxies", "iet_sd.engine.proxy:Proxy.enter"),
    ("proxies", "iet_sd.engine.proxy:Proxy.leave"),
    ("proxies", "iet_sd.engine.rounds:Trainer.take_in"),
    ("proxies", "iet_sd.engine.rounds:Trainer.run_round"),
    (REST, "iet_sd.engine.rounds:Trainer.train_shard"),
    ("logging", "iet_sd.reporting:Reporter.show"),
)
"""Parts and what they are clocked around, MODULE:NAME.

``method``: bank, mask, strengths, and who is trained next. ``rest of a step``: counts, lists of
samples, and memory that is freed.
``proxies``: what a round costs beside its steps: taking turns, averages, redistribution.
"""
NAMES = (SCORING, *dict.fromkeys(part for part, _ in PARTS))


def profile(argv: Sequence[str], warm_up: int) -> Profile:
    """Train in this process with clocks, which run after ``warm_up`` rounds.

    Errors: `SystemExit` if training fails, or a function of `PARTS` is gone.
    """
    found = Profile()
    run = Trainer.run

    def clocked_run(self: Trainer, state: Any) -> Iterator[Any]:
        with found.clock.within(REST):
            for event in run(self, state):
                yield event
                if not isinstance(event, RoundDone):
                    continue
                if event.round <= warm_up:
                    found.clock.restart()
                else:
                    found.trained += sum(shard.counts.trained for shard in event.shards)
                    found.steps += sum(shard.counts.steps for shard in event.shards)

    with clocked(PARTS, found.clock), mock.patch.object(Trainer, "run", clocked_run):
        status = train(argv)
    if status:
        raise SystemExit(status)
    return found


def profiles(
    setting: Setting,
    rows: Sequence[str],
    warm_up: int,
    rounds: int,
    work: Path,
    peers: Path | None = None,
) -> tuple[str, dict[str, Any]]:
    """Rows one after the other in this process: a table in Markdown, and seconds by row and part.

    ``rounds`` are clocked, after ``warm_up``. ``peers``: the folder of diffusers' scripts.
    """
    found = {}
    for key in (bar := tqdm(rows)):
        bar.set_description(f"Row {key}")
        row = ROWS[key]
        argv = argv_of(row, setting, warm_up + rounds, work / key, work / "cache" / key)
        if row.peer:
            script = script_of(row, setting.train_mode, peers)
            steps = setting.updates(rounds)
            found[key] = peer_profile(script, argv, setting.updates(warm_up), steps, setting.batch)
        else:
            found[key] = profile(argv, warm_up)
    record = {
        key: {"seconds": dict(p.clock.seconds), "trained": p.trained, "steps": p.steps}
        for key, p in found.items()
    }
    return table(found), record


def table(found: Mapping[str, Profile]) -> str:
    """Shares of parts, a column a row, and the whole."""
    shares = {key: p.shares() for key, p in found.items()}
    head = ["part", *(f"{key}: {ROWS[key].title}" for key in found)]
    rows = [[part, *(f"{shares[key][part]:.1%}" for key in found)] for part in NAMES]
    for what in ("steps", "trained"):
        each = [1e3 * p.clock.seconds.total() / getattr(p, what) for p in found.values()]
        name = "ms a step" if what == "steps" else "ms a trained image"
        rows.append([name, *(f"{milliseconds:.1f}" for milliseconds in each)])
    return tables.markdown(head, rows)
