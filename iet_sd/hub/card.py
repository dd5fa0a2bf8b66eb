"""What goes with the weights: the model card, and the settings to train them again."""

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from iet_sd.config import Config, ModelConfig
from iet_sd.engine.tracking import table
from iet_sd.files import write_text_atomic
from iet_sd.hub.contents import (
    CARD,
    EVALUATED,
    FRONTIER,
    GRID,
    SCHEDULER,
    SETTINGS,
    STAND_IN,
    is_local,
    shown,
)
from iet_sd.hub.memorization import NOT_MEASURED, section

_METHOD = {
    "iet_agc_plus": "IET-AGC+: shards with averaged proxies, skipping (AGC), threshold-aware "
    "augmentation (TAA), redistribution of the most skipped samples (MSR)",
    "iet_agc": "IET-AGC: shards with averaged proxies, skipping (AGC)",
    "agc_taa": "skipping (AGC) and threshold-aware augmentation (TAA) in one model",
    "iet": "IET: shards with averaged proxies",
    "none": "plain fine-tuning",
}
_AIM = (
    "The method is there to memorize less of the training images "
    "([arXiv 2502.09434](https://arxiv.org/abs/2502.09434)).\n"
)
_BASE = "path/to/the/base/model"
"""What a card calls a base that is a folder of this machine, in its example."""
_VAE = "path/to/the/vae"
_END = "<!-- iet_sd: end of evaluation -->"
_SECTION = re.compile(f"{re.escape(EVALUATED).replace(re.escape('{}'), '.*?')}.*?{_END}", re.DOTALL)


def write_settings(folder: Path, config: Config) -> None:
    """Write ``training_config.yaml``: every setting, resolved, ready for ``--config``."""
    anew = dataclasses.replace(config.training, resume_from_checkpoint=None)
    values = dataclasses.replace(config, training=anew).as_dict()
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_text_atomic(folder / SETTINGS, text)


def write_card(
    folder: Path,
    config: Config,
    num_samples: int,
    rounds: list[dict[str, Any]],
    pipeline: str = "StableDiffusionPipeline",
    picture: str = GRID,
    advice: str = "",
    round: int | None = None,
) -> None:
    """Write ``README.md``: what was trained from what, by which method, on which data.

    rounds: lines of metrics.jsonl. pipeline: the class that loads the model. picture: of the
    validation prompts, shown if there are any and it is in ``folder``. advice: what round to keep,
    if rounds were measured; `FRONTIER` in ``folder`` shows them. round: whose weights these are; by
    default the last.
    An evaluation in ``folder`` is of weights before these: `refresh_card` comes after the next.
    """
    model, method, training = config.model, config.method, config.training
    base = shown(model.pretrained_model_name_or_path)
    total = {key: sum(line[key] for line in rounds) for key in ("updates", "trained", "skipped")}
    scored = sum(line["scored"] for line in rounds)
    done = (
        f"{method.num_rounds}"
        if len(rounds) == method.num_rounds
        else (f"{len(rounds)} of {method.num_rounds}, training goes on")
    )
    facts = {
        "method": f"`{method.method}`, preset `{method.preset}`",
        "shards, rounds": f"{method.num_shards}, {done}",
        "weights": f"after round {len(rounds) if round is None else round}",
        "trained": _trained(config),
        "data": f"{plain(shown(config.data.dataset_name or config.data.train_data_dir))}, "
        f"{num_samples} images at {config.data.resolution} px",
        "optimizer updates": f"{total['updates']} over all proxies, batch size "
        f"{training.train_batch_size}, learning rate {training.learning_rate:g}",
        "samples": f"{total['trained']} trained, {total['skipped']} of {scored} skipped",
        "seed": str(training.seed),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    content = f"""---
{_metadata(config).to_yaml()}
---

# {plain(shown(training.output_dir))}

Stable Diffusion fine-tuned from {plain(base)}. Method: {_METHOD[method.method]}.
{"" if method.method == "none" else _AIM}{_pictures(folder, training.validation_prompts, picture)}
| | |
|---|---|
{rows}

All settings are in `{SETTINGS}`.

```
{table(rounds)}
```
{_advised(advice, folder)}
{_between("none", NOT_MEASURED)}

## Use

```python
{_usage(model, pipeline, (folder / SCHEDULER).is_file())}
```
"""
    write_text_atomic(folder / CARD, str(ModelCard(content)))


def refresh_card(folder: Path, report: Path) -> bool:
    """Have the card in ``folder`` tell of the evaluation ``report``, and keep all else as it is.

    Returns whether there is a card of ours.
    """
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = json.loads(report.read_text(encoding="utf-8"))
    told = _between(found["created"], section(found))
    text, count = _SECTION.subn(lambda _: told, text)
    if count:
        write_text_atomic(card, text)
    return bool(count)


def plain(text: str) -> str:
    """A text as Markdown that shows it: on one line, with no markup and no end of a table cell."""
    line = html.escape(" ".join(text.split()), quote=False)
    line = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line)
    # Of a list, or a heading, where the text begins a line.
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", line)


def _between(created: str, text: str) -> str:
    return f"{EVALUATED.format(created)}\n\n{text}\n\n{_END}"


def _metadata(config: Config) -> ModelCardData:
    """What the Hub reads. It knows no license, since base and data may have any."""
    base, lora = config.model.pretrained_model_name_or_path, config.model.train_mode == "lora"
    on_hub = {} if is_local(base) else {"base_model_relation": "adapter" if lora else "finetune"}
    data = config.data.dataset_name
    return ModelCardData(
        base_model=None if is_local(base) else base,
        datasets=None if data is None or is_local(data) else [data],
        library_name="diffusers",
        pipeline_tag="text-to-image",
        inference=True,
        tags=["stable-diffusion", "text-to-image", "diffusers", "iet-agc", *["lora"] * lora],
        **on_hub,
    )


def _trained(config: Config) -> str:
    lora = config.model.train_mode == "lora"
    parts = "the UNet and text encoder" if config.model.train_text_encoder else "the UNet"
    return f"LoRA on {parts}, rank {config.model.rank}" if lora else f"all of {parts}"


def _pictures(folder: Path, prompts: tuple[str, ...] | None, picture: str) -> str:
    """The sheet of validation images, and what it was drawn for."""
    if not prompts or not (folder / picture).is_file():
        return ""
    rows = "\n".join(f"- {plain(prompt)}" for prompt in prompts)
    return f"\n![Images for the validation prompts]({picture})\n\n{rows}\n"


def _advised(advice: str, folder: Path) -> str:
    """What round to keep, and the picture that shows why, if there is one."""
    picture = f"\n![Memorization and held-out loss by round]({FRONTIER})\n"
    return advice and f"\n{advice}\n{picture if (folder / FRONTIER).is_file() else ''}"


def _usage(model: ModelConfig, pipeline: str, own_scheduler: bool) -> str:
    """Code that draws a picture; a LoRA needs its base as it was trained with it."""
    if model.train_mode != "lora":
        return _code([pipeline], f"{pipeline}.from_pretrained({json.dumps(STAND_IN)})", [])
    base, vae = model.pretrained_model_name_or_path, model.pretrained_vae_model_name_or_path
    names, arguments = [pipeline], [json.dumps(_BASE if is_local(base) else base)]
    for name in ("revision", "variant"):
        if value := getattr(model, name):
            arguments.append(f"{name}={json.dumps(value)}")
    if vae:
        names.insert(0, "AutoencoderKL")
        place = json.dumps(_VAE if is_local(vae) else vae)
        arguments.append(f"vae=AutoencoderKL.from_pretrained({place})")
    after = [f'pipeline.load_lora_weights("{STAND_IN}")']
    if own_scheduler:
        cls = "type(pipeline.scheduler)"
        own = f'{cls}.from_pretrained("{STAND_IN}", subfolder="scheduler")'
        after.append(f"pipeline.scheduler = {own}")
    return _code(names, f"{pipeline}.from_pretrained({', '.join(arguments)})", after)


def _code(names: list[str], pipeline: str, after: list[str]) -> str:
    lines = [f"from diffusers import {', '.join(names)}", "", f"pipeline = {pipeline}", *after]
    return "\n".join([*lines, 'pipeline("a prompt").images[0]'])
