"""The code that a card shows draws what was trained."""

import numpy as np
import pytest
from diffusers import AutoencoderKL, StableDiffusionPipeline

from iet_sd.arguments import from_layers
from iet_sd.hub.card import write_card
from iet_sd.hub.contents import CARD, SCHEDULER, contents
from iet_sd.models.saving import save_result
from tests.models.test_saving import draw, pipeline_image, trained

LORA = {"train_mode": "lora", "rank": 4, "lora_alpha": 8.0}


@pytest.fixture
def places(pipelines, tmp_path):
    """A base whose weights have a variant, and another VAE, by the name of their setting."""
    base, vae = tmp_path / "base", tmp_path / "vae"
    StableDiffusionPipeline.from_pretrained(pipelines["sd2"]).save_pretrained(base, variant="fp16")
    other = AutoencoderKL.from_pretrained(pipelines["sd2"], subfolder="vae")
    other.register_to_config(scaling_factor=0.5)
    other.save_pretrained(vae)
    return {"pretrained_model_name_or_path": base, "pretrained_vae_model_name_or_path": vae}


@pytest.mark.parametrize("mode", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"prediction_type": "epsilon"},
        {"rescale_betas_zero_snr": True},
        {"pretrained_vae_model_name_or_path": True},
    ],
    ids=str,
)
def test_the_code_of_a_card_draws_what_was_trained(mode, given, places, tmp_path):
    given = {name: str(places[name]) if name in places else value for name, value in given.items()}
    base, result = str(places["pretrained_model_name_or_path"]), tmp_path / "result"
    components, model = trained(base, variant="fp16", **mode, **given)
    save_result(components, model, result)
    settings = {"train_data_dir": str(tmp_path), "output_dir": str(result)}
    config = from_layers({"pretrained_model_name_or_path": base, **mode, **given, **settings})
    config = from_layers(config.as_dict() | {"variant": "fp16"})
    write_card(result, config, 16, [])

    code = (result / CARD).read_text().split("```python\n")[1].split("```")[0]
    for stand_in, place in {
        "path/to/the/base/model": base,
        "path/to/this/folder": str(result),
        "path/to/the/vae": str(places["pretrained_vae_model_name_or_path"]),
    }.items():
        code = code.replace(stand_in, place)
    *lines, last = code.strip().split("\n")
    assert last == 'pipeline("a prompt").images[0]'
    names = {}
    exec("\n".join(lines), names)
    np.testing.assert_allclose(pipeline_image(names["pipeline"]), draw(components), atol=1e-4)
    # All that the code reads is pushed.
    changed = mode == LORA and {"prediction_type", "rescale_betas_zero_snr"} & set(given)
    assert (SCHEDULER in contents(result, "me/cats")) == (not mode or bool(changed))


def test_a_card_names_revision_and_variant_of_the_base_of_a_lora(tmp_path):
    base = {"pretrained_model_name_or_path": "some/model", "revision": "v1", "variant": "fp16"}
    data = {"train_data_dir": str(tmp_path), "output_dir": str(tmp_path / "result")}
    (tmp_path / "result").mkdir()
    write_card(tmp_path / "result", from_layers(LORA | base | data), 16, [])
    text = (tmp_path / "result" / CARD).read_text()
    assert '.from_pretrained("some/model", revision="v1", variant="fp16")\n' in text
