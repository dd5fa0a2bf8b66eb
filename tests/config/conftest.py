import pytest

from iet_sd.arguments import load
from tests.config.needed import FLAGS


@pytest.fixture
def loaded(tmp_path):
    """The flat settings of a YAML text and flags."""

    def make(text="", *flags):
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return load([*FLAGS, "--config", str(path), *flags]).as_dict()

    return make
