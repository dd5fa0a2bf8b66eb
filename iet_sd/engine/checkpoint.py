"""Checkpoints: safetensors and JSON, whole or not there, resumed exactly.

    checkpoint-3/                   after round 3, written by all processes together
      state.json                    round, settings, data; size and CRC-32 of every file
      weights.safetensors           trainable weights after the last aggregation
      moments.safetensors           AdamW's moments after it, if they are averaged too
      velocity.safetensors          momentum of the outer optimizer, if it has any
      ema.safetensors               moving average of the weights, if there is one
      samples.safetensors           shard and skip count of every sample
      history.json                  what every round did, for metrics.jsonl
      probes.json                   what was measured after rounds (--eval_every_rounds)
      proxy-0.safetensors           own weights, moments and average, if any, and the bank
      proxy-0.json                  schedule, loss scale, queue of kept samples
      process-0-of-2/               what process 0 has done of round 4, written by it alone
        shard-0-done/               a shard that has had its round: proxy, skips, counts
        shard-2-step-40/            the one under way

Processes need each other at the end of a round only, so within one each saves by itself and goes on
where it was. The checkpoint of a round can be resumed by any number of processes.
"""

import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from iet_sd.engine.collectives import together
from iet_sd.engine.identity import differences
from iet_sd.engine.proxy import Proxy
from iet_sd.engine.rounds import RoundDone, ShardDone, State, Trainer
from iet_sd.engine.rounds import logger as shard_logger
from iet_sd.engine.sealed import MANIFEST, seal, unseal
from iet_sd.engine.step import Counts, Memory, Pending
from iet_sd.engine.store import Tensors
from iet_sd.errors import UserError
from iet_sd.files import atomic_folder, new_staging, publish, staging_for
from iet_sd.method.agc import Bank

logger = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a round's end that was found whole."""

    folder: Path
    round: int
    identity: dict[str, Any]
    """Of the run that made it (`iet_sd.engine.identity`)."""


def goes_on_here(found: Checkpoint | None, output_dir: Path) -> bool:
    """Whether the run goes on from a checkpoint of its own output folder."""
    return found is not None and found.folder.resolve().parent == output_dir.resolve()


def find(output_dir: Path, name: str | None) -> Checkpoint | None:
    """What ``--resume_from_checkpoint`` means, a path or ``latest``; reads all of its files.

    ``latest`` is the newest that is whole; damaged ones are named in a warning. None if there is
    nothing to go on from yet, so that a job can be started again by the same command.
    Errors: `UserError` if the named one is not there or damaged, or all are damaged.
    """
    if name is None:
        return None
    there = _checkpoints(output_dir)
    if name != "latest":
        for folder in (Path(name), output_dir / name):
            if folder.is_dir() and (_NAME.fullmatch(folder.name) or (folder / MANIFEST).is_file()):
                return _open(folder)
        names = ", ".join(path.name for path in there) or "none"
        raise UserError(
            f"--resume_from_checkpoint {name}: not a checkpoint folder. In {output_dir}: {names}."
        )
    for folder in reversed(there):
        try:
            return _open(folder)
        except UserError as error:
            logger.warning("%s", error)
    if there:
        raise UserError(
            f"--resume_from_checkpoint latest: every checkpoint in {output_dir} is damaged. "
            "Start from the beginning with --overwrite_output_dir and without "
            "--resume_from_checkpoint."
        )
    logger.warning("no checkpoint in %s yet: starting from the beginning", output_dir)
    return None


def save(
    output_dir: Path,
    state: State,
    identity: dict[str, Any],
    process_index: int,
    num_processes: int,
) -> Path:
    """Write ``checkpoint-ROUND`` under ``output_dir``. All processes take part.

    ``identity`` is what a resumed run must share (see `load`). After an error on any process there
    is no such checkpoint, and nothing else has changed.
    """
    final = output_dir / f"checkpoint-{state.round}"
    is_main = process_index == 0

    def prepare() -> None:
        if is_main:
            # Of a run that went further before it was resumed from an earlier checkpoint.
            shutil.rmtree(final, ignore_errors=True)
            new_staging(final)

    def write() -> None:
        for shard, proxy in state.proxies.items():
            _save_proxy(staging_for(final), shard, proxy)

    def finish() -> None:
        if is_main:
            staging = staging_for(final)
            save_file(state.weights, staging / "weights.safetensors")
            save_file(state.moments, staging / "moments.safetensors")
            save_file(state.velocity, staging / "velocity.safetensors")
            save_file(state.ema, staging / "ema.safetensors")
            samples = {"shard_of": state.shard_of_N, "skips": state.skips_N}
            save_file(samples, staging / "samples.safetensors")
            history = [asdict(event) for event in state.history]
            (staging / "history.json").write_text(json.dumps(history))
            (staging / "probes.json").write_text(json.dumps(state.probes))
            seal(staging, {"round": state.round, "identity": identity})
            publish(final)

    try:
        for part in (prepare, write, finish):
            together(part, num_processes)
    finally:
        if is_main:
            shutil.rmtree(staging_for(final), ignore_errors=True)
    return final


def require_same(found: Checkpoint, identity: dict[str, Any], but: Collection[str] = ()) -> None:
    """Errors: `UserError` with every difference of the checkpoint's identity from ``identity``.

    ``but`` what is not known yet.
    """
    pair = ({k: v for k, v in of.items() if k not in but} for of in (found.identity, identity))
    if differing := differences(*pair):
        raise UserError(
            f"{found.folder} was made with other settings, model or data, so training cannot go "
            f"on exactly: {'; '.join(differing)}. Use the same ones, or start anew in another "
            "--output_dir."
        )


def load(found: Checkpoint, state: State, identity: dict[str, Any]) -> None:
    """Put ``state``, fresh from `Trainer.start`, back to the end of the checkpoint's round.

    Errors: as `require_same`.
    """
    require_same(found, identity)
    folder = found.folder
    state.round = found.round
    state.weights = _read(folder / "weights.safetensors")
    state.moments = _read(folder / "moments.safetensors")
    state.velocity = _read(folder / "velocity.safetensors")
    state.ema = _read(folder / "ema.safetensors")
    samples = _read(folder / "samples.safetensors")
    state.shard_of_N, state.skips_N = samples["shard_of"], samples["skips"]
    state.probes = json.loads((folder / "probes.json").read_text())
    for event in json.loads((folder / "history.json").read_text()):
        shards = [_shard_done(shard) for shard in event["shards"]]
        state.history.append(RoundDone(**event | {"shards": shards}))
    for shard, proxy in state.proxies.items():
        proxy.keep(_load_proxy(folder, shard, proxy))


def save_within_round(
    checkpoint: Path, state: State, shard: int, process: str, done: ShardDone | None = None
) -> None:
    """Write what this process has done of ``shard`` since ``checkpoint``; by one process alone.

    At a `StepDone`, or with ``done`` at that; ``process`` is like ``0-of-2``.
    """
    progress, proxy = state.progress, state.proxies[shard]
    folder = checkpoint / f"process-{process}"
    final = folder / f"shard-{shard}-{'done' if done else f'step-{progress.counts.steps}'}"
    # Of the same step, if it was damaged: a folder that is there would be merged into.
    shutil.rmtree(final, ignore_errors=True)
    older = list(folder.glob(f"shard-{shard}-*"))
    with atomic_folder(final) as staging:
        _save_proxy(staging, shard, proxy)
        save_file({"new_skips": progress.new_skips_N}, staging / "skips.safetensors")
        content = {"counts": asdict(progress.counts), "seconds": progress.seconds}
        seal(staging, {**content, "done": asdict(done) if done else None})
    for path in older:
        shutil.rmtree(path)


def load_within_round(checkpoint: Path, trainer: Trainer, state: State, process: str) -> None:
    """Do again what this process did after ``checkpoint``, if it was saved by as many processes.

    Fills in ``state.progress``. What was saved in a damaged folder is trained again.
    """
    progress = trainer.no_progress(state)
    for shard, proxy in state.proxies.items():
        folder, content = next(_within(checkpoint / f"process-{process}", shard), (None, None))
        if folder is None:
            break
        state.progress = progress
        progress.new_skips_N = _read(folder / "skips.safetensors")["new_skips"]
        tensors = _load_proxy(folder, shard, proxy)
        progress.counts, progress.seconds = Counts(**content["counts"]), content["seconds"]
        if content["done"] is None:
            progress.shard = shard
            proxy.keep(tensors)
            break
        trainer.take_in(state, _shard_done(content["done"]), tensors)


def remove_within_round(checkpoint: Path) -> None:
    """Delete what was saved of the round after ``checkpoint``."""
    for folder in checkpoint.glob("process-*"):
        shutil.rmtree(folder)


def remove_after(output_dir: Path, round: int) -> None:
    """Delete the checkpoints of later rounds, which would pass for those of the run to come."""
    for path in _checkpoints(output_dir):
        if _round_of(path) > round:
            shutil.rmtree(path)


def remove_beyond(output_dir: Path, limit: int) -> None:
    """Delete the oldest checkpoints, but for the last ``limit``."""
    for path in _checkpoints(output_dir)[:-limit]:
        shutil.rmtree(path)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Folders of checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(filter(Path.is_dir, found), key=_round_of)


def _round_of(checkpoint: Path) -> int:
    return int(_NAME.fullmatch(checkpoint.name)[1])


def _open(folder: Path) -> Checkpoint:
    content = unseal(folder)
    return Checkpoint(folder, content["round"], content["identity"])


def _within(folder: Path, shard: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folders of a shard that are whole, with their content, the latest first."""
    steps = sorted(folder.glob(f"shard-{shard}-step-*"), key=lambda p: int(p.name.split("-")[-1]))
    for path in [*folder.glob(f"shard-{shard}-done"), *reversed(steps)]:
        try:
            yield path, unseal(path)
        except UserError as error:
            shard_logger.warning("%s Its steps are done again.", error)


def _shard_done(content: dict[str, Any]) -> ShardDone:
    return ShardDone(**content | {"counts": Counts(**content["counts"])})


def _read(file: Path) -> Tensors:
    """The tensors of a file: copies, since a file that is mapped is not wholly gone when deleted.

    On NFS its folder would stay, and could not be deleted.
    """
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def _save_proxy(folder: Path, shard: int, proxy: Proxy) -> None:
    bank = proxy.memory.bank
    tensors = {**proxy.tensors(), "bank/value": bank.value_T, "bank/visits": bank.visits_T}
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, folder / f"proxy-{shard}.safetensors"
    )
    rest = {
        "lr_scheduler": proxy.lr_scheduler.state_dict(),
        "scaler": proxy.scaler.state_dict(),
        "queue": proxy.memory.queue,
    }
    (folder / f"proxy-{shard}.json").write_text(json.dumps(rest))


def _load_proxy(folder: Path, shard: int, proxy: Proxy) -> Tensors:
    """Fill ``proxy`` but for its weights and moments, which are returned."""
    tensors = _read(folder / f"proxy-{shard}.safetensors")
    bank = Bank(tensors.pop("bank/value"), tensors.pop("bank/visits"))
    rest = json.loads((folder / f"proxy-{shard}.json").read_text())
    proxy.lr_scheduler.load_state_dict(rest["lr_scheduler"])
    # The schedule writes a rate only when it steps; the next update needs the one it last wrote.
    for group, rate in zip(
        proxy.optimizer.param_groups, proxy.lr_scheduler.get_last_lr(), strict=True
    ):
        group["lr"] = rate
    proxy.scaler.load_state_dict(rest["scaler"])
    queue = [Pending(*pending) for pending in rest["queue"]]
    proxy.memory = Memory(bank, queue)
    return tensors
