"""A pipeline to generate with, and images that it gives."""

import pytest

from iet_sd.evaluation.generate import generate
from tests.evaluation.generating import REQUEST, Loader, pixels


@pytest.fixture
def loader(pipelines):
    return Loader(pipelines["sd1"])


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def reference(request, pipelines, tmp_path_factory):
    """Folder of a pipeline, and its images, drawn one by one."""
    folder = pipelines[request.param]
    cache = tmp_path_factory.mktemp("reference")
    return folder, pixels(generate(REQUEST, "model", Loader(folder), cache, batch_size=1))
