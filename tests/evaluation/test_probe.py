"""A reading is a small evaluation: the same numbers, and nothing of the model is changed."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from iet_sd.arguments import from_layers
from iet_sd.cli.main import main
from iet_sd.data.sources import load_source
from iet_sd.errors import UserError
from iet_sd.evaluation.embedders import build_embedder
from iet_sd.evaluation.heldout import load_heldout
from iet_sd.evaluation.probe import Probe, Reading
from iet_sd.models.adapter import make_trainable
from iet_sd.models.loading import as_pipeline, load_components
from tests.pipelines import RESOLUTION

SMALL = {
    "eval_every_rounds": 1,
    "eval_prompts": 6,
    "eval_inference_steps": 2,
    "eval_guidance_scale": 3.0,
    "eval_samples": 8,
    "eval_timesteps": 3,
}


@pytest.fixture
def config(pipelines, images, heldout):
    def make(kind="sd1", **given):
        return from_layers(
            {
                "pretrained_model_name_or_path": str(pipelines[kind]),
                "train_data_dir": str(images),
                "heldout_data_dir": str(heldout),
                "resolution": RESOLUTION,
                "train_batch_size": 4,
                "seed": 5,
            },
            SMALL | given,
        )

    return make


@pytest.fixture
def probe_of(tmp_path):
    def make(config):
        train = load_source(config.data)
        return Probe(
            config.probe,
            config.data,
            train,
            load_heldout(config.data, train),
            build_embedder(config.probe.eval_embedder),
            config.training.seed,
            config.training.train_batch_size,
            tmp_path / "probe",
        )

    return make


def model(config):
    components = load_components(config.model, torch.float32, None)
    make_trainable(components, config.model, seed=0)
    return components


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_reading_is_what_evaluate_says_of_the_same_images(kind, config, probe_of, tmp_path):
    settings = config(kind, caption_prefix="a photo:")
    found = probe_of(settings).read(3, as_pipeline(model(settings)), nullcontext)
    flags = {
        "pretrained_model_name_or_path": settings.model.pretrained_model_name_or_path,
        "train_data_dir": settings.data.train_data_dir,
        "heldout_data_dir": settings.data.heldout_data_dir,
        "caption_prefix": settings.data.caption_prefix,
        "resolution": RESOLUTION,
        "output_dir": tmp_path / "evaluation",
        "seed": settings.training.seed,
        "num_prompts": 6,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "generation_batch_size": 4,
        "embedders": "pixels",
        "quality_embedder": "none",
        "membership_samples": 8,
        "membership_timesteps": 3,
        "bootstrap_resamples": 1000,
    }
    argv = [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
    assert main(["evaluate", *argv]) == 0
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    measures = {m["name"]: m for m in reversed(report["measures"])}
    line = found.line()
    assert (line["kind"], line["round"]) == ("probe", 3)
    for name in ("memorization_score", "excess_score"):
        for end, key in (("", "value"), ("_low", "low"), ("_high", "high")):
            assert line[name + end] == pytest.approx(measures[name][key], abs=1e-6), name + end
    for name in ("heldout_loss", "loss_gap", "membership_auc"):
        assert line[name] == pytest.approx(measures[name]["value"], rel=1e-5), name
        assert line[f"{name}_low"] <= line[name] <= line[f"{name}_high"]
    assert line["train_loss"] == pytest.approx(line["heldout_loss"] - line["loss_gap"])
    assert np.mean(found.heldout_loss_N) == pytest.approx(line["heldout_loss"])


def test_a_reading_changes_nothing_and_is_repeated_exactly(config, probe_of):
    """Of an adapter in training, whose dropout would make noise."""
    settings = config(train_mode="lora", lora_dropout=0.5)
    components = model(settings)
    for name, parameter in components.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    components.unet.train()
    before = {name: t.clone() for name, t in components.unet.state_dict().items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = (
        probe_of(settings).read(1, as_pipeline(components), nullcontext) for _ in range(2)
    )
    assert vars(first) | {"seconds": 0} == vars(second) | {"seconds": 0}
    assert torch.equal(torch.get_rng_state(), state)
    assert components.unet.training
    assert all(torch.equal(t, before[name]) for name, t in components.unet.state_dict().items())
    assert Reading.from_json(json.loads(json.dumps(first.as_json()))) == first


def test_readings_of_other_settings_or_images_are_told_apart(config, probe_of):
    settings = [config(), config(keep_best=True), config(eval_every_rounds=7)]
    settings += [config(eval_prompts=7), config(eval_timesteps=2), config(seed=6)]
    settings += [config(eval_embedder="raw_pixels"), config(max_train_samples=15)]
    prints = [probe_of(each).fingerprint for each in settings]
    assert prints[0] == prints[1] == prints[2]
    assert len(set(prints)) == len(prints) - 2


def test_one_image_is_not_enough(config, probe_of):
    with pytest.raises(UserError, match="at least 2 training images; got 1"):
        probe_of(config(max_train_samples=1))


def test_pictures_are_embedded_as_many_at_a_time_as_are_drawn(config, probe_of):
    """Beside a model in training there is no room for all of them."""
    settings = config()
    probe, seen = probe_of(settings), []
    embedder = probe.embedder
    counted = replace(embedder, forward=lambda x: seen.append(len(x)) or embedder.forward(x))
    pictures = [Image.new("RGB", (32, 32), (8 * n, 0, 0)) for n in range(2 * probe.batch_size + 1)]
    whole = [embedder(pictures), embedder([ImageOps.mirror(p) for p in pictures])]
    probe.embedder = counted
    assert all(map(np.allclose, probe._features(pictures), whole))
    assert seen == [probe.batch_size, probe.batch_size, 1] * 2
