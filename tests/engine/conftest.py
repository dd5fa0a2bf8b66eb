from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from iet_sd.arguments import from_layers
from iet_sd.config import Config
from iet_sd.data.dataset import TrainingImages
from iet_sd.data.shards import split
from iet_sd.data.sources import load_source
from iet_sd.engine.objective import Objective
from iet_sd.engine.plan import steps_per_round
from iet_sd.engine.rounds import Trainer
from iet_sd.models.adapter import lora_pairs, make_trainable
from iet_sd.models.loading import load_components
from tests.pipelines import RESOLUTION

BUCKETS = {"aspect_ratio_buckets": "32,32;24,40;40,24"}


@pytest.fixture
def settings(pipelines, images, tmp_path):
    """A `Config` for short training of a tiny pipeline."""

    def make(kind="sd1", **given) -> Config:
        short = {
            "pretrained_model_name_or_path": str(pipelines[kind]),
            "train_data_dir": str(images),
            "output_dir": str(tmp_path / "output"),
            "cache_dir": str(tmp_path / "cache"),
            "resolution": RESOLUTION,
            "train_batch_size": 4,
            "num_rounds": 2,
            "learning_rate": 1e-3,
            "seed": 0,
            "mixed_precision": "no",
        }
        return from_layers(short, given)

    return make


@pytest.fixture
def trainer_for():
    """A `Trainer` and its first `State`, from a `Config`: what the command line builds."""

    def make(config: Config, store=None):
        source = load_source(config.data)
        shard_of_N = split(source.groups, config.method.num_shards, 0, config.method.shard_split)
        components = load_components(config.model, torch.float32, None)
        parameters = make_trainable(components, config.model, seed=0)
        trainer = Trainer(
            config=config,
            seed=config.training.seed,
            steps_per_round=steps_per_round(config, len(source.sample_ids)),
            objective=Objective(
                components,
                torch.device("cpu"),
                nullcontext,
                config.training.noise_offset,
                config.training.snr_gamma,
                config.training.input_perturbation,
                config.training.dream,
            ),
            dataset=TrainingImages(source, components.tokenize, config.data),
            parameters=parameters,
            lora_pairs=lora_pairs(parameters),
            device=torch.device("cpu"),
        )
        return trainer, trainer.start(shard_of_N, store)

    return make


@pytest.fixture
def train(settings, trainer_for):
    """Train to the end; returns the final weights and all events."""

    def run(**given):
        trainer, state = trainer_for(settings(**given))
        events = list(trainer.run(state))
        return {k: p.detach().clone() for k, p in trainer.parameters.items()}, events

    return run


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder of 16 pictures of three shapes."""
    root = tmp_path_factory.mktemp("shapes")
    for number in range(16):
        size = (*[(40, 40), (30, 50), (50, 30)][number % 3], 3)
        pixels = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        (root / f"{number:02d}.txt").write_text(f"a cat {number}")
    return {"train_data_dir": str(root), **BUCKETS}
