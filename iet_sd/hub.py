"""What goes with the weights: the model card, and the settings to train them again."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from iet_sd.config import Config
from iet_sd.engine.tracking import table
from iet_sd.files import write_text_atomic

GRID = "sample_grid.png"
SETTINGS = "training_config.yaml"
_PARTS = {
    "iet_agc_plus": "IET-AGC+: shards with averaged proxies, skipping (AGC), threshold-aware "
    "augmentation (TAA), redistribution of the most skipped samples (MSR)",
    "iet_agc": "IET-AGC: shards with averaged proxies, skipping (AGC)",
    "iet": "IET: shards with averaged proxies",
    "none": "plain fine-tuning",
}
_AIM = (
    "The method is there to memorize less of the training images "
    "([arXiv 2502.09434](https://arxiv.org/abs/2502.09434)).\n"
)


def write_settings(folder: Path, config: Config) -> None:
    """Write ``training_config.yaml``: every setting, resolved, ready for ``--config``."""
    text = yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)
    write_text_atomic(folder / SETTINGS, text)


def write_card(
    folder: Path, config: Config, num_samples: int, rounds: list[dict[str, Any]]
) -> None:
    """Write ``README.md``: what was trained from what, by which method, on which data.

    ``rounds`` are lines of metrics.jsonl.
    """
    model, method, training = config.model, config.method, config.training
    base = _shown(model.pretrained_model_name_or_path)
    lora = model.train_mode == "lora"
    data = ModelCardData(
        base_model=None if _is_local(model.pretrained_model_name_or_path) else base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        inference=True,
        tags=["stable-diffusion", "text-to-image", "diffusers", "iet-agc", *["lora"] * lora],
    )
    total = {key: sum(line[key] for line in rounds) for key in ("updates", "trained", "skipped")}
    scored = sum(line["scored"] for line in rounds)
    shown = {
        "method": f"`{method.method}`, preset `{method.preset}`",
        "shards, rounds": f"{method.num_shards}, {method.num_rounds}",
        "trained": "LoRA on the UNet, rank " + str(model.rank) if lora else "all of the UNet",
        "data": f"{_shown(config.data.dataset_name or config.data.train_data_dir)}, "
        f"{num_samples} images at {config.data.resolution} px",
        "optimizer updates": f"{total['updates']} over all proxies, batch size "
        f"{config.training.train_batch_size}, learning rate {training.learning_rate:g}",
        "samples": f"{total['trained']} trained, {total['skipped']} of {scored} skipped",
        "seed": str(training.seed),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in shown.items())
    pictures = f"\n![Images for the validation prompts]({GRID})\n"
    content = f"""---
{data.to_yaml()}
---

# {_shown(training.output_dir)}

Stable Diffusion fine-tuned from {base}. Method: {_PARTS[method.method]}.
{"" if method.method == "none" else _AIM}{pictures if training.validation_prompts else ""}
| | |
|---|---|
{rows}

All settings are in `{SETTINGS}`.

```
{table(rounds)}
```

## Use

```python
{_usage(lora, base)}
```
"""
    write_text_atomic(folder / "README.md", str(ModelCard(content)))


def _usage(lora: bool, base: str) -> str:
    if lora:
        return (
            "from diffusers import StableDiffusionPipeline\n\n"
            f'pipeline = StableDiffusionPipeline.from_pretrained("{base}")\n'
            'pipeline.load_lora_weights("path/to/this/folder")\n'
            'pipeline("a prompt").images[0]'
        )
    return (
        "from diffusers import StableDiffusionPipeline\n\n"
        'pipeline = StableDiffusionPipeline.from_pretrained("path/to/this/folder")\n'
        'pipeline("a prompt").images[0]'
    )


def _is_local(name: str) -> bool:
    return Path(name).expanduser().exists()


def _shown(name: str) -> str:
    """A name without the folders of this machine."""
    return Path(name).expanduser().resolve().name if _is_local(name) else name
