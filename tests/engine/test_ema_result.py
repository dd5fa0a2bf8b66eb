"""What a run with a moving average leaves: the average, and the weights beside it."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageChops
from safetensors.torch import load_file

from iet_sd.cli.train import train as command
from tests.compare import equal
from tests.engine.running import LORA
from tests.launching import finish


def files(folder):
    """The averaged and the raw weights of a result, full or LoRA."""
    lora = "pytorch_lora_weights{}.safetensors"
    if (folder / lora.format("")).is_file():
        return load_file(folder / lora.format("")), load_file(folder / lora.format("_non_ema"))
    name = "diffusion_pytorch_model.safetensors"
    return load_file(folder / "unet" / name), load_file(folder / "unet_non_ema" / name)


@pytest.mark.parametrize("mode", [{}, LORA], ids=["full", "lora"])
def test_the_result_is_the_average_and_the_weights_are_beside_it(mode, argv, tmp_path, capsys):
    """The weights are those of a run without; both load with diffusers alone."""
    given = {**mode, "learning_rate": 1e-2, "steps_per_round": 4}
    drawn = {"validation_rounds": 1, "num_validation_images": 1, "validation_inference_steps": 2}
    drawn |= {"validation_prompt": "a cat"}
    assert command(argv(**given, **drawn, use_ema="")) == 0
    average, raw = files(tmp_path / "output")
    assert command(argv(**given, **drawn, output_dir=tmp_path / "without")) == 0
    without = tmp_path / "without"
    assert not list(without.rglob("*non_ema*"))
    name = (
        "pytorch_lora_weights.safetensors" if mode else "unet/diffusion_pytorch_model.safetensors"
    )
    assert equal(raw, load_file(without / name))
    assert average.keys() == raw.keys()
    assert not equal(average, raw)
    last = load_file(tmp_path / "output" / "checkpoint-2" / "ema.safetensors")
    assert sorted(t.norm().item() for t in last.values()) == sorted(
        t.norm().item() for t in average.values()
    )
    # Pictures are those of the average, on the way and at the end.
    pictures = [
        Image.open(folder / name)
        for folder in (tmp_path / "output", without)
        for name in ("validation-2.png", "sample_grid.png")
    ]
    differ = [ImageChops.difference(pictures[0], other).getbbox() is not None for other in pictures]
    assert differ == [False, False, True, True]
    if mode:
        return
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "output", subfolder="unet_non_ema")
    assert equal(dict(unet.named_parameters()), raw)
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "output")
    assert equal(dict(again.unet.named_parameters()), average)


def test_a_text_encoder_that_is_trained_has_an_average_too(argv, tmp_path):
    given = {"train_text_encoder": "", "learning_rate": 1e-2, "steps_per_round": 4}
    assert command(argv(**given, use_ema="")) == 0
    output = tmp_path / "output"
    average, raw = (
        load_file(output / part / "model.safetensors")
        for part in ("text_encoder", "text_encoder_non_ema")
    )
    assert average.keys() == raw.keys()
    assert not equal(average, raw)
    assert command(argv(**given, output_dir=tmp_path / "without")) == 0
    assert equal(raw, load_file(tmp_path / "without" / "text_encoder" / "model.safetensors"))


def test_diffusers_loads_the_average_of_a_lora(argv, pipelines, tmp_path):
    assert command(argv(**LORA, learning_rate=1e-2, use_ema="")) == 0
    average, raw = files(tmp_path / "output")
    for weight_name, expected in (
        (None, average),
        ("pytorch_lora_weights_non_ema.safetensors", raw),
    ):
        pipeline = StableDiffusionPipeline.from_pretrained(pipelines["sd1"])
        pipeline.load_lora_weights(str(tmp_path / "output"), weight_name=weight_name)
        loaded = {n: p for n, p in pipeline.unet.named_parameters() if "lora" in n}
        assert sorted(p.norm().item() for p in loaded.values()) == pytest.approx(
            sorted(t.norm().item() for t in expected.values())
        )


def test_another_run_takes_the_weights_beside_away(argv, tmp_path):
    assert command(argv(use_ema="", num_rounds=1)) == 0
    assert command(argv(**LORA, use_ema="", num_rounds=1, overwrite_output_dir="")) == 0
    assert not (tmp_path / "output" / "unet_non_ema").exists()
    assert command(argv(num_rounds=1, overwrite_output_dir="")) == 0
    assert not list((tmp_path / "output").glob("*non_ema*"))


@pytest.mark.slow
def test_two_processes_equal_one(argv, tmp_path):
    given = {**LORA, "use_ema": "", "num_shards": 3, "num_rounds": 3, "steps_per_round": 4}
    given |= {"agc_threshold": 1.0, "bank_bins": 1}
    finish(argv(**given), processes=2)
    assert command(argv(**given, output_dir=tmp_path / "one")) == 0
    for two, one in zip(files(tmp_path / "output"), files(tmp_path / "one"), strict=True):
        assert all(torch.allclose(two[k], one[k], atol=1e-4) for k in one)
