"""``python -m iet_sd evaluate``, ``generate`` and ``compare``: parse, check, run, tell."""

import shlex
import signal
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iet_sd.arguments import load, read_yaml
from iet_sd.cli.common import make_accelerator, status_of
from iet_sd.config import CompareSettings, Config, DataConfig, EvaluateSettings, GenerateSettings
from iet_sd.errors import Stopped, UserError
from iet_sd.files import check_writable

if TYPE_CHECKING:
    from iet_sd.evaluation.pipelines import Model
    from iet_sd.evaluation.sets import Process

_KEPT = "what was drawn and embedded is kept"
_WAY_ON = f"Make room and run again: {_KEPT}."
_TIMEOUT = timedelta(hours=24)


def evaluate(argv: Sequence[str]) -> int:
    """Run ``python -m iet_sd evaluate``; returns the exit status."""
    return _status_of(lambda: _evaluate(argv), f"Run again to go on: {_KEPT}.")


def generate(argv: Sequence[str]) -> int:
    """Run ``python -m iet_sd generate``; returns the exit status."""
    return _status_of(lambda: _generate(argv), f"Run again to go on: {_KEPT}.")


def compare(argv: Sequence[str]) -> int:
    """Run ``python -m iet_sd compare``; returns the exit status."""
    return _status_of(lambda: _compare(argv))


def _status_of(command: Callable[[], None], kept: str = "") -> int:
    """As `status_of`; a Ctrl-C is one line, which ends with what is ``kept``."""

    def stoppable() -> None:
        try:
            command()
        except KeyboardInterrupt:
            raise Stopped(signal.SIGINT, kept) from None

    return status_of(stoppable, _WAY_ON)


def _evaluate(argv: Sequence[str]) -> None:
    prog = "python -m iet_sd evaluate"
    settings = load(argv, EvaluateSettings, prog, below=_as_trained)
    from iet_sd.evaluation import run
    from iet_sd.hub.card import refresh_card
    from iet_sd.hub.contents import EVALUATION

    run.check(settings)
    output_dir = _output_dir(settings)
    check_writable(output_dir)
    if cache_dir := settings.evaluation.evaluation_cache_dir:
        check_writable(Path(cache_dir), "--evaluation_cache_dir")
    model, process = _set_up(settings)
    command = f"{prog} {shlex.join(argv)}"
    report = run.evaluate(settings, model, output_dir, command, process)
    if report is not None:
        print(f"{report['verdict']}\nSaved to {output_dir}: open {output_dir / 'report.html'}")
        folder = _result_folder(settings)
        if folder is not None and output_dir == folder / EVALUATION:
            refresh_card(folder, output_dir / "report.json")


def _generate(argv: Sequence[str]) -> None:
    settings = load(argv, GenerateSettings, "python -m iet_sd generate", below=_as_trained)
    from iet_sd.data.sources import load_source
    from iet_sd.evaluation import run

    run.check(settings)
    output_dir = _output_dir(settings)
    check_writable(output_dir)
    model, process = _set_up(settings)
    source = None if settings.generation.prompts else load_source(settings.data)
    generations, _ = run.draw(settings, model, source, output_dir / "cache", process)
    if not process.index:
        print(f"{len(generations)} images in {generations.folder}")


def _compare(argv: Sequence[str]) -> None:
    settings = load(argv, CompareSettings, "python -m iet_sd compare")
    from iet_sd.evaluation.compare import compare

    print(compare(settings.comparison))


def _as_trained(values: dict[str, Any]) -> dict[str, Any]:
    """What the ``training_config.yaml`` beside the weights says of the data.

    Errors: `UserError` if what was given contradicts itself; what was trained with may differ.
    """
    heldout = [name for name in ("heldout_split", "heldout_data_dir") if values.get(name)]
    if values.get("without_heldout") and heldout:
        raise UserError(f"--without_heldout leaves out what --{heldout[0]} names: give one.")
    for key in ("lora_weights", "pretrained_model_name_or_path"):
        place = Path(str(values.get(key, ""))).expanduser()
        file = (place if place.is_dir() else place.parent) / "training_config.yaml"
        if key in values and file.is_file():
            trained = read_yaml(file, Config, "settings of the model")
            kept = {name for name in DataConfig.__dataclass_fields__ if name in trained}
            return {name: trained[name] for name in kept}
    return {}


def _output_dir(settings: EvaluateSettings | GenerateSettings) -> Path:
    """As given; else ``evaluation`` in the folder of the LoRA or model, or here for a Hub id."""
    if settings.generation.output_dir:
        return Path(settings.generation.output_dir).expanduser()
    return (_result_folder(settings) or Path()) / "evaluation"


def _result_folder(settings: EvaluateSettings | GenerateSettings) -> Path | None:
    """Where the LoRA or model lies; None for a Hub id."""
    pipeline = settings.pipeline
    place = Path(pipeline.lora_weights or pipeline.pretrained_model_name_or_path).expanduser()
    return place if place.is_dir() else place.parent if place.is_file() else None


def _set_up(settings: EvaluateSettings | GenerateSettings) -> tuple["Model", "Process"]:
    """The model, to be loaded on this process's device, and the process."""
    import torch

    from iet_sd.evaluation.pipelines import Model
    from iet_sd.evaluation.sets import Process

    accelerator = make_accelerator(settings.pipeline.mixed_precision, _TIMEOUT)
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = dtypes.get(accelerator.mixed_precision, torch.float32)
    model = Model(settings.pipeline, settings.data.cache_dir, accelerator.device, dtype)
    place = accelerator.process_index, accelerator.num_processes
    return model, Process(*place, accelerator.wait_for_everyone)
