"""What is worth saying of settings before a run.

No errors, as who compares methods gives all of them the same settings.
"""

import logging
from collections.abc import Iterator

from iet_sd.config import Config

logger = logging.getLogger(__name__)
_DECAYING = ("linear", "cosine", "cosine_with_restarts", "polynomial")


def warn(config: Config, steps: int) -> None:
    """Say it, for ``steps`` steps a round."""
    for remark in (*_length(config, steps), *_schedule(config, steps), *_unused(config)):
        logger.warning(remark)


def _length(config: Config, steps: int) -> Iterator[str]:
    """Where steps a round come to clearly more than --max_train_steps."""
    method, asked = config.method, config.training.max_train_steps
    least = method.num_shards * method.num_rounds
    if asked and not method.steps_per_round and steps * least > 1.05 * asked:
        yield (
            f"--max_train_steps {asked} becomes {steps * least}: all of {method.num_shards} shards "
            f"make whole steps in each of {method.num_rounds} rounds. Give a multiple of {least}, "
            "fewer --num_rounds, or --steps_per_round."
        )


def _schedule(config: Config, steps: int) -> Iterator[str]:
    """Where the learning rate does not rise to its peak, or not fall to its end."""
    method, training = config.method, config.training
    updates, warmup = steps * method.num_rounds, training.lr_warmup_steps
    if training.lr_scheduler != "constant" and warmup >= updates:
        yield (
            f"--lr_warmup_steps {warmup}: a proxy makes {updates} updates in all rounds, so the "
            "learning rate rises to the end and never is --learning_rate. Give fewer."
        )
    if method.step_unit == "batch" and method.agc and training.lr_scheduler in _DECAYING:
        yield (
            f"--lr_scheduler {training.lr_scheduler} counts updates, and --step_unit batch (preset "
            "paper) batches, of which some update nothing: the learning rate does not fall to the "
            "end of the schedule. Use --step_unit update or a constant schedule."
        )


def _unused(config: Config) -> Iterator[str]:
    """Settings that are not what they would be anyway, of what is off."""
    if unused := config.method.unused():
        on = [part.upper() for part in ("agc", "taa", "msr") if getattr(config.method, part)]
        parts = f"only {' and '.join(on)}" if on else "neither AGC, TAA nor MSR"
        yield (
            f"{_flags(unused)}: of no effect, since what it is a setting of is off "
            f"(--method {config.method.method}: {parts})."
        )
    training = config.training
    needs = {
        "--eval_every_rounds": (
            config.probe.eval_every_rounds,
            *("eval_prompts", "eval_inference_steps", "eval_guidance_scale", "eval_samples"),
            *("eval_timesteps", "eval_embedder"),
        ),
        "--validation_prompts": (
            training.validation_prompts,
            *("num_validation_images", "validation_inference_steps", "validation_guidance_scale"),
        ),
        "--dream_training": (training.dream_training, "dream_detail_preservation"),
        "--lr_scheduler polynomial": (training.lr_scheduler == "polynomial", "lr_power"),
        "--lr_scheduler cosine_with_restarts": (
            training.lr_scheduler == "cosine_with_restarts",
            "lr_num_cycles",
        ),
        "a --lr_scheduler that warms up": (training.lr_scheduler != "constant", "lr_warmup_steps"),
        "random crops (--no-center_crop)": (not config.data.center_crop, "cache_crops"),
        "--aspect_ratio_buckets auto": (
            config.data.aspect_ratio_buckets == "auto",
            "bucket_reso_steps",
        ),
        "--push_to_hub": (config.push.push_to_hub, "hub_model_id", "hub_private"),
    }
    given, fields = config.as_dict(), config.fields()
    for need, (is_met, *names) in needs.items():
        others = [name for name in names if given[name] != fields[name].default]
        if others and not is_met:
            yield f"{_flags(others)}: of no effect without {need}."


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name}" for name in names)
