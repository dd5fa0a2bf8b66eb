"""Training images as the command line prepares them, and the tables that this leaves."""

import torch

from iet_sd.data.sources import load_source
from iet_sd.engine.beforehand import choose
from iet_sd.engine.caching import cached_images
from iet_sd.models.adapter import make_trainable
from iet_sd.models.loading import load_components
from tests.pipelines import RESOLUTION

FITTING = {"resolution": RESOLUTION, "center_crop": True}


def prepare(config, visits=10**6, processes=(0, 1)):
    components = load_components(config.model, torch.float32, None)
    parameters = make_trainable(components, config.model, seed=0)
    source = load_source(config.data)
    beforehand = choose(config, source, visits)
    images = cached_images(config, source, components, beforehand, *processes)
    return components, parameters, images


def tables(tmp_path):
    return sorted((tmp_path / "cache" / "iet_sd").iterdir())
