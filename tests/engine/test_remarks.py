"""What is said of settings before a run, and of which nothing is said."""

import re

import pytest

from iet_sd.arguments import from_layers, read_yaml
from iet_sd.config import Config
from iet_sd.engine import plan, remarks
from tests.launching import ROOT


@pytest.mark.parametrize(("asked", "said"), [(20, False), (39, False), (21, True), (3, True)])
def test_more_updates_than_were_asked_for_are_said(asked, said, settings, caplog):
    config = settings(max_train_steps=asked, num_shards=4, num_rounds=5)
    remarks.warn(config, plan.steps_per_round(config, 16))
    total = 20 if asked <= 20 else 40
    assert (f"--max_train_steps {asked} becomes {total}: " in caplog.text) == said


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ({"method": "none", "agc_threshold": 0.9}, "--agc_threshold: of no effect"),
        ({"method": "none", "agc_threshold": 0.9}, r"\(--method none: neither AGC, TAA nor MSR\)"),
        ({"method": "none", "preset": "strict", "bank_bins": 50}, None),
        ({"method": "iet_agc", "agc_threshold": 0.9, "bank_bins": 7}, None),
        ({"method": "iet_agc", "taa_magnitude": 5.0}, None),
        (
            {"method": "iet_agc", "taa_magnitude": 9.0, "msr_every": 3},
            r"--taa_magnitude, --msr_every: .* \(--method iet_agc: only AGC\)",
        ),
        ({"taa": False, "taa_num_ops": 3}, r"--taa_num_ops: .*: only AGC and MSR\)"),
        ({"method": "iet", "bank_bias": "raw", "preset": "paper"}, None),
        ({"method": "iet", "bank_bias": "corrected", "preset": "paper"}, "--bank_bias: "),
    ],
)
def test_settings_of_parts_that_are_off_are_said(given, unused, settings, caplog):
    remarks.warn(settings(**given), 10)
    assert re.search(unused, caplog.text) if unused else not caplog.text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"eval_prompts": 9, "eval_samples": 9}, "--eval_prompts, --eval_samples: .* --eval_every"),
        ({"cache_crops": 8, "center_crop": True}, "--cache_crops: .* without random crops"),
        ({"cache_crops": 8}, None),
        ({"dream_detail_preservation": 2.0}, "--dream_detail_preservation: .* --dream_training"),
        ({"dream_detail_preservation": 2.0, "dream_training": True}, None),
        ({"num_validation_images": 2}, "--num_validation_images: .* --validation_prompts"),
        ({"num_validation_images": 2, "validation_prompts": ("a cat",)}, None),
        ({"lr_power": 2.0}, "--lr_power: .* --lr_scheduler polynomial"),
        ({"lr_warmup_steps": 7}, "--lr_warmup_steps: .* --lr_scheduler that warms up"),
        ({"hub_model_id": "name", "hub_private": True}, "--hub_model_id, --hub_private: "),
        ({"bucket_reso_steps": 8}, "--bucket_reso_steps: "),
    ],
    ids=str,
)
def test_settings_that_need_another_one_are_said(given, said, settings, caplog):
    remarks.warn(settings(**given), 10)
    assert re.search(f"^{said}", caplog.messages[0]) if said else not caplog.messages
    assert len(caplog.messages) == bool(said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 20}, "a proxy makes 20 updates in all"),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 19}, None),
        ({}, None),  # constant, which has no warm-up
        (
            {"lr_scheduler": "linear", "lr_warmup_steps": 0, "preset": "paper"},
            "--lr_scheduler linear counts updates",
        ),
        (
            {"lr_scheduler": "linear", "lr_warmup_steps": 0, "preset": "paper", "method": "iet"},
            None,
        ),
        (
            {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0, "preset": "paper"},
            None,
        ),
    ],
    ids=str,
)
def test_a_learning_rate_that_does_not_get_where_it_should_is_said(given, said, settings, caplog):
    remarks.warn(settings(**given), 10)
    assert (said or "") in caplog.text
    assert len(caplog.messages) == bool(said)


CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "eval" not in path.stem]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_of_the_configs_nothing_is_said(path, caplog):
    config = from_layers(read_yaml(path, Config, "--config"))
    remarks.warn(config, plan.steps_per_round(config, 10_000))
    assert not caplog.messages
