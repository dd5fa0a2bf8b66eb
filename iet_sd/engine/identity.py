"""What a run must have in common with the one it goes on from: settings, model and data."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from iet_sd.config import Config

# Settings that change what is shown or written, and not what is trained.
_FREE = {
    "cache_dir",
    "dataloader_num_workers",
    "ddp_timeout",
    "eval_every_rounds",
    "eval_prompts",
    "eval_inference_steps",
    "eval_guidance_scale",
    "eval_samples",
    "eval_timesteps",
    "eval_embedder",
    "keep_best",
    "heldout_data_dir",
    "heldout_split",
    "on_nonfinite",
    "output_dir",
    "overwrite_output_dir",
    "checkpointing_rounds",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "proxy_store",
    "report_to",
    "logging_dir",
    "tracker_project_name",
    "validation_prompts",
    "validation_rounds",
    "num_validation_images",
    "validation_inference_steps",
    "validation_guidance_scale",
    "dry_run",
    "local_rank",
    "offload_ema",
    "validation_epochs",
    "save_kohya_lora",
    "merge_lora",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
    "hub_push_rounds",
}
# Settings that are compared by what they come to: the model's files, samples, steps of a round.
_RESOLVED = {
    "max_train_steps",
    "num_train_epochs",
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "revision",
    "variant",
    "dataset_name",
    "dataset_config_name",
    "train_data_dir",
    "dataset_split",
    "image_column",
    "caption_column",
    "sample_id_column",
    "group_column",
    "repeats_column",
    "max_train_samples",
    "on_bad_image",
    "on_missing_caption",
    "check_images",
}


def identity(
    config: Config, steps_per_round: int, model: str, samples: Sequence[Any]
) -> dict[str, Any]:
    """What two runs share if one can go on from the other, as JSON.

    ``model``: a fingerprint of the model that training starts from. ``samples``: what tells each
    sample from any other, as JSON.
    """
    mine = {k: v for k, v in config.as_dict().items() if k not in _FREE | _RESOLVED}
    digest = hashlib.sha256(json.dumps(samples).encode()).hexdigest()
    return {
        **mine,
        "steps_per_round": steps_per_round,
        "model": f"files with SHA-256 {model[:16]}",
        "data": f"{len(samples)} samples with SHA-256 {digest[:16]}",
    }


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two identities, a text each."""
    return [
        f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
