"""``--output_dir`` of a training run: what an earlier run has left there, and when it goes away."""

import re
import shutil
from pathlib import Path

from iet_sd import probing
from iet_sd.config import Config
from iet_sd.engine import checkpoint
from iet_sd.errors import UserError
from iet_sd.hub.contents import GRID, PENDING, SETTINGS
from iet_sd.models.family import PARTS
from iet_sd.models.layout import INDEX
from iet_sd.models.saving import KOHYA_LORA, MERGED, NON_EMA, NON_EMA_LORA

_LORA = "pytorch_lora_weights.safetensors"
_METRICS = "metrics.jsonl"
_RESULTS = (INDEX, _LORA)
_RECORDS = (*_RESULTS, _METRICS, "checkpoint-*")
# Names of all that a run writes.
_WRITTEN = re.compile(
    "|".join(
        [
            *map(re.escape, (INDEX, *PARTS, _LORA, _METRICS, "README.md")),
            *map(re.escape, (KOHYA_LORA, MERGED, NON_EMA_LORA)),
            *(f"{part}{NON_EMA}" for part in PARTS),
            *map(re.escape, (SETTINGS, GRID, PENDING)),
            *map(re.escape, (probing.FOLDER, probing.PICTURE, probing.BEST)),
            r"validation-\d+\.png",
            r"checkpoint-\d+",
            r"\.(checkpoint-\d+\.)?partial",
        ]
    )
)


def open_checkpoint(config: Config) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, if any; reads all of it, so on the main process alone.

    Errors: `UserError` for one that is not there or damaged, or for an output folder with what no
    run may write over without being told to.
    """
    training = config.training
    output_dir = Path(training.output_dir)
    found = checkpoint.find(output_dir, training.resume_from_checkpoint)
    if not training.dry_run:
        _check_inputs(output_dir, config)
        if not training.overwrite_output_dir and not goes_on_here(found, output_dir):
            # An unfinished run without checkpoints can be started again by the same command.
            restarts = training.resume_from_checkpoint == "latest"
            _check_nothing_lost(output_dir, _RESULTS if restarts else _RECORDS)
    return found


def goes_on_here(found: checkpoint.Checkpoint | None, output_dir: Path) -> bool:
    """Whether the run goes on from a checkpoint of its own output folder."""
    return found is not None and found.folder.resolve().parent == output_dir.resolve()


def make_way(config: Config) -> None:
    """Delete all that an earlier run wrote, and nothing else, if --overwrite_output_dir allows it.

    On the main process, when all else is ready for training to begin.
    """
    output_dir = Path(config.training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if not config.training.overwrite_output_dir:
        return
    for path in output_dir.iterdir():
        if _WRITTEN.fullmatch(path.name):
            is_folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if is_folder else path.unlink()
    logs = output_dir / config.training.logging_dir / config.training.tracker_project_name
    if output_dir.resolve() in logs.resolve().parents:
        shutil.rmtree(logs, ignore_errors=True)


def _check_inputs(output_dir: Path, config: Config) -> None:
    """The result must not go into the folder of the model or the data."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file; give a folder.")
    inputs = {
        "model": config.model.pretrained_model_name_or_path,
        "VAE": config.model.pretrained_vae_model_name_or_path,
        "training data": config.data.train_data_dir or config.data.dataset_name,
    }
    for what, name in inputs.items():
        if name is None:
            continue
        place = Path(name).expanduser().resolve()
        if place.is_dir() and place == output_dir.resolve():
            raise UserError(
                f"--output_dir {output_dir} is the folder of the {what} to start from; give "
                "another one."
            )
        if place.parent == output_dir.resolve() and _WRITTEN.fullmatch(place.name):
            raise UserError(
                f"{name}, the {what} to start from, is what a run writes in --output_dir "
                f"{output_dir}; give another one."
            )


def _check_nothing_lost(output_dir: Path, names: tuple[str, ...]) -> None:
    if any(any(output_dir.glob(name)) for name in names):
        raise UserError(
            f"--output_dir {output_dir} holds a model or an earlier run. Go on with it by "
            "--resume_from_checkpoint latest, replace it by --overwrite_output_dir, or give "
            "another folder."
        )
