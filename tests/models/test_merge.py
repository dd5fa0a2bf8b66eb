"""A LoRA folded into its base: the same pictures, in the base's own precision."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from iet_sd.models.saving import LORA, MERGED, save_result
from tests.models.test_saving import CALL, UNET, files_of, folders, trained  # noqa: F401

LORA_RUN = {"train_mode": "lora", "rank": 4, "lora_alpha": 6.0, "merge_lora": True}
TEXT = "text_encoder/model.safetensors"
OTHER_LAYERS = ("to_q", "conv1", "conv_shortcut", "proj_in", "time_emb_proj")


def picture(base, lora=None):
    pipeline = DiffusionPipeline.from_pretrained(base)
    if lora:
        pipeline.load_lora_weights(lora)
    return pipeline("a cat", generator=torch.Generator().manual_seed(0), **CALL).images


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("sd1", {}),
        ("sd2", {"train_text_encoder": True}),
        ("sd1", {"use_dora": True, "train_text_encoder": True}),
        ("sd1", {"use_dora": True, "lora_target_modules": OTHER_LAYERS}),
        ("sd1", {"lora_target_modules": OTHER_LAYERS}),
        ("sdxl", {"train_text_encoder": True}),
    ],
    ids=["unet", "text encoder", "dora", "dora of convolutions", "convolutions", "xl"],
)
def test_the_merged_pipeline_draws_as_base_and_lora(kind, given, folders, tmp_path):  # noqa: F811
    base = folders[kind]
    # Trained in bf16: the base in memory is no longer the one on disk.
    components, config = trained(base, torch.bfloat16, **LORA_RUN, **given)
    save_result(components, config, tmp_path)
    merged = tmp_path / MERGED
    assert {path.name for path in tmp_path.iterdir()} == {LORA, MERGED}
    assert files_of(merged) == files_of(base)
    np.testing.assert_allclose(picture(merged), picture(base, tmp_path), atol=2e-5)
    assert np.abs(picture(merged) - picture(base)).max() > 1e-2
    texts = {f"{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2")}
    changed = {UNET, *texts} if "train_text_encoder" in given else {UNET}
    for name in files_of(base) - {"scheduler/scheduler_config.json"}:
        same = (merged / name).read_bytes() == (base / name).read_bytes()
        assert same is (name not in changed), name


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_keep_the_dtype_and_names_that_the_base_has(variant, folders, tmp_path):  # noqa: F811
    half = StableDiffusionPipeline.from_pretrained(folders["sd1"]).to(dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant=variant)
    components, config = trained(
        tmp_path / "half", variant=variant, train_text_encoder=True, **LORA_RUN
    )
    save_result(components, config, tmp_path / "result")
    merged = tmp_path / "result" / MERGED
    for name in (UNET, TEXT):
        stem, _, end = name.rpartition(".")
        before = load_file(tmp_path / "half" / (f"{stem}.{variant}.{end}" if variant else name))
        after = load_file(merged / name)
        assert before.keys() == after.keys()
        assert {tensor.dtype for tensor in after.values()} == {torch.float16}
        assert any(not torch.equal(before[key], after[key]) for key in before)
    assert np.isfinite(picture(merged)).all()


def test_a_weight_is_rounded_once(folders, tmp_path):  # noqa: F811
    """By hand: W + (alpha / rank) B A in fp32, then to fp16."""
    half = StableDiffusionPipeline.from_pretrained(folders["sd1"]).to(dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    components, config = trained(tmp_path / "half", **LORA_RUN)
    save_result(components, config, tmp_path / "result")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    layer = components.unet.get_submodule(name)
    before = load_file(tmp_path / "half" / UNET)[f"{name}.weight"].float()
    added = layer.lora_B.default.weight @ layer.lora_A.default.weight * (6.0 / 4)
    after = load_file(tmp_path / "result" / MERGED / UNET)[f"{name}.weight"]
    assert torch.equal(after, (before + added).half())


def test_an_older_merged_pipeline_is_replaced_as_a_whole(folders, tmp_path):  # noqa: F811
    components, config = trained(folders["sd1"], **LORA_RUN)
    (tmp_path / MERGED / "unet").mkdir(parents=True)
    (tmp_path / MERGED / "unet" / "old.safetensors").write_text("")
    save_result(components, config, tmp_path)
    assert files_of(tmp_path / MERGED) == files_of(folders["sd1"])
