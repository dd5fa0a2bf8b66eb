"""``--output_dir`` of a training run: what an earlier run has left there, and when it goes away."""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from iet_sd import probing
from iet_sd.arguments import read_yaml
from iet_sd.config import Config
from iet_sd.engine import checkpoint
from iet_sd.engine.store import FOLDER as WAITING
from iet_sd.errors import UserError
from iet_sd.files import check_writable, remove_leftovers
from iet_sd.hub.contents import GRID, PENDING, SETTINGS
from iet_sd.models.family import PARTS
from iet_sd.models.layout import INDEX, LORA
from iet_sd.models.saving import KOHYA_LORA, MERGED, NON_EMA, NON_EMA_LORA

logger = logging.getLogger("iet_sd")
_LOCK = ".lock"
# Seconds for an earlier run to end, which may be saving what it has done.
_PATIENCE = 15
_METRICS = "metrics.jsonl"
_RESULTS = (INDEX, LORA)
_RECORDS = (*_RESULTS, _METRICS, "checkpoint-*")
# Names of all that a run writes.
_WRITTEN = re.compile(
    "|".join(
        [
            *map(re.escape, (INDEX, *PARTS, LORA, _METRICS, "README.md")),
            *map(re.escape, (KOHYA_LORA, MERGED, NON_EMA_LORA)),
            *(f"{part}{NON_EMA}" for part in PARTS),
            *map(re.escape, (SETTINGS, GRID, PENDING, WAITING)),
            *map(re.escape, (probing.FOLDER, probing.PICTURE, probing.BEST)),
            r"validation-\d+\.png",
            r"checkpoint-\d+",
            r"\.(checkpoint-\d+\.)?partial",
        ]
    )
)


def take_output_dir(config: Config, at_end: ExitStack) -> None:
    """Have --output_dir for this run alone until ``at_end``, on the main process.

    Errors: `UserError` for a folder that can't be written to, is that of the model or the data, or
    is another run's. What is made here goes away again if the run leaves nothing in it. A dry run
    writes nothing, so it takes nothing.
    """
    if config.training.dry_run:
        return
    output_dir = Path(config.training.output_dir)
    _check_inputs(output_dir, config)
    is_new = not os.path.exists(output_dir)
    check_writable(output_dir)
    if is_new:
        at_end.callback(_remove_if_empty, output_dir)
    at_end.enter_context(_locked(output_dir))


def open_checkpoint(config: Config) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, if any; reads all of it, so on the main process alone.

    Errors: `UserError` for one that is not there or damaged, for an output folder with what no run
    may write over without being told to, or may not write over at all as no run has written it.
    """
    training = config.training
    output_dir = Path(training.output_dir)
    found = checkpoint.find(output_dir, training.resume_from_checkpoint)
    if training.dry_run or checkpoint.goes_on_here(found, output_dir):
        return found
    _check_nothing_of_others(output_dir)
    if not training.overwrite_output_dir:
        # An unfinished run without checkpoints can be started again by the same command.
        restarts = training.resume_from_checkpoint == "latest"
        _check_nothing_lost(output_dir, _RESULTS if restarts else _RECORDS)
    return found


def make_way(config: Config, found: checkpoint.Checkpoint | None) -> None:
    """Delete what only a run that was killed could use, and all that another wrote, if allowed.

    Nothing else goes: --overwrite_output_dir allows that, for a run that does not go on from it. On
    the main process, when all else is ready for training to begin, and before proxies wait here.
    """
    output_dir = Path(config.training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output_dir / WAITING, ignore_errors=True)
    remove_leftovers(output_dir)
    goes_on = checkpoint.goes_on_here(found, output_dir)
    if goes_on or not config.training.overwrite_output_dir:
        return
    for path in output_dir.iterdir():
        if _WRITTEN.fullmatch(path.name):
            is_folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if is_folder else path.unlink()
    logs = output_dir / config.training.logging_dir / config.training.tracker_project_name
    if output_dir.resolve() in logs.resolve().parents:
        shutil.rmtree(logs, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against other runs; the system unlocks it however this process ends."""
    lock = FileLock(folder / _LOCK)
    _acquire(lock, folder)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    """Errors: `UserError` if another run still has the lock after a while."""
    # Before we try: some versions of filelock empty the file then.
    holder = _holder(Path(lock.lock_file))
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another run%s to end in --output_dir %s", holder, folder)
            lock.acquire(timeout=_PATIENCE, poll_interval=0.2)
    except Timeout as error:
        raise UserError(
            f"--output_dir {folder} is in use by another run{holder}. Wait until that ends, or "
            "stop it, then start this one again; or give another folder."
        ) from error
    except (NotImplementedError, OSError) as error:
        logger.warning(
            "--output_dir %s is on a disk without locks (%s): start no other run in it",
            folder,
            error,
        )
    else:
        with suppress(OSError):  # Windows keeps others off a locked file, and us
            Path(lock.lock_file).write_text(str(os.getpid()))


def _holder(path: Path) -> str:
    """Who has the lock, for a message, if it can be told."""
    try:
        number = path.read_text()
    except OSError:
        return ""
    return f" (process {number})" if number else ""


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _check_inputs(output_dir: Path, config: Config) -> None:
    """The result must not go into the folder of the model or the data."""
    inputs = {
        "model": config.model.pretrained_model_name_or_path,
        "VAE": config.model.pretrained_vae_model_name_or_path,
        "training data": config.data.train_data_dir or config.data.dataset_name,
    }
    for what, name in inputs.items():
        if name is None:
            continue
        place, target = Path(name).expanduser().resolve(), output_dir.resolve()
        if not place.exists() and place in (target, *target.parents):
            raise UserError(
                f"--output_dir {output_dir} would make a folder {name}, and that would be taken "
                f"for the {what} to start from, {name} on the Hub; give another one."
            )
        if place.is_dir() and place == target:
            raise UserError(
                f"--output_dir {output_dir} is the folder of the {what} to start from; give "
                "another one."
            )
        if place.parent == target and _WRITTEN.fullmatch(place.name):
            raise UserError(
                f"{name}, the {what} to start from, is what a run writes in --output_dir "
                f"{output_dir}; give another one."
            )


def _check_nothing_of_others(output_dir: Path) -> None:
    """Errors: `UserError` for files of the names that a run writes, where there has been no run."""
    if _holds(output_dir, _RECORDS) or _has_settings(output_dir):
        return
    found = sorted(path.name for path in output_dir.glob("[!.]*") if _WRITTEN.fullmatch(path.name))
    if found:
        raise UserError(
            f"--output_dir {output_dir} holds {', '.join(found)}, which no run has written, and "
            "this one would write over. Move that elsewhere, or give another folder."
        )


def _has_settings(output_dir: Path) -> bool:
    """Whether the settings of a run are there, which it writes first of all."""
    try:
        return bool(read_yaml(output_dir / SETTINGS, Config, "settings"))
    except UserError:
        return False


def _check_nothing_lost(output_dir: Path, names: tuple[str, ...]) -> None:
    if _holds(output_dir, names):
        raise UserError(
            f"--output_dir {output_dir} holds a model or an earlier run. Go on with it by "
            "--resume_from_checkpoint latest, replace it by --overwrite_output_dir, or give "
            "another folder."
        )


def _holds(output_dir: Path, names: tuple[str, ...]) -> bool:
    """Whether anything of these names, with wildcards, is there."""
    return any(any(output_dir.glob(name)) for name in names)
