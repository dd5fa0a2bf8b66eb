"""``python -m iet_sd evaluate``, ``generate`` and ``compare``: parse, check, run, tell."""

import shlex
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iet_sd.arguments import load, read_yaml
from iet_sd.cli.common import make_accelerator, status_of
from iet_sd.config import CompareSettings, Config, DataConfig, EvaluateSettings, GenerateSettings

if TYPE_CHECKING:
    from iet_sd.evaluation.pipelines import Model
    from iet_sd.evaluation.sets import Process

_WAY_ON = "Make room and run again: what was drawn and embedded is kept."
_TIMEOUT = timedelta(hours=24)


def evaluate(argv: Sequence[str]) -> int:
    """Run ``python -m iet_sd evaluate``; returns the exit status."""
    return status_of(lambda: _evaluate(argv), _WAY_ON)


def generate(argv: Sequence[str]) -> int:
    """Run ``python -m iet_sd generate``; returns the exit status."""
    return status_of(lambda: _generate(argv), _WAY_ON)


def compare(argv: Sequence[str]) -> int:
    """Run ``python -m iet_sd compare``; returns the exit status."""
    return status_of(lambda: _compare(argv), _WAY_ON)


def _evaluate(argv: Sequence[str]) -> None:
    prog = "python -m iet_sd evaluate"
    settings = load(argv, EvaluateSettings, prog, below=_as_trained)
    from iet_sd.evaluation import run
    from iet_sd.hub.card import refresh_card
    from iet_sd.hub.contents import EVALUATION

    run.check(settings)
    output_dir = _output_dir(settings)
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
    model, process = _set_up(settings)
    source = None if settings.generation.prompts else load_source(settings.data)
    generations, _ = run.draw(settings, model, source, _output_dir(settings) / "cache", process)
    if not process.index:
        print(f"{len(generations)} images in {generations.folder}")


def _compare(argv: Sequence[str]) -> None:
    settings = load(argv, CompareSettings, "python -m iet_sd compare")
    from iet_sd.evaluation.compare import compare

    print(compare(settings.comparison))


def _as_trained(values: dict[str, Any]) -> dict[str, Any]:
    """What the ``training_config.yaml`` beside the weights says of the data."""
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
