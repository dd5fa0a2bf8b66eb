"""The file for kohya, A1111 and ComfyUI: its names by hand, and the same pictures."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from iet_sd.models.kohya import sgm_path
from iet_sd.models.saving import KOHYA_LORA, LORA, save_result
from tests.models.test_saving import CALL, files_of, folders, trained  # noqa: F401

ATTENTION = {"train_mode": "lora", "rank": 4, "lora_alpha": 6.0, "save_kohya_lora": True}
OTHERS = ("to_q", "conv1", "conv_shortcut", "ff.net.0.proj", "proj_in", "time_emb_proj", "conv")
# What sd-scripts' LoRANetwork calls the layers of one attention, and of one text encoder's layer.
ATTENTION_BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_"
TEXT_BLOCK = "lora_te_text_model_encoder_layers_1_"
LAYERS = {
    ATTENTION_BLOCK: ("to_q", "to_k", "to_v", "to_out_0"),
    TEXT_BLOCK: ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj"),
}


def saved(base, folder, **given):
    """Both files of a trained LoRA in ``folder``; what was trained."""
    components, config = trained(base, **ATTENTION, **given)
    save_result(components, config, folder)
    changed = {"scheduler/scheduler_config.json"} if "prediction_type" in given else set()
    assert files_of(folder) == {LORA, KOHYA_LORA} | changed
    return components


def picture(base, lora=None):
    pipeline = DiffusionPipeline.from_pretrained(base)
    if lora:
        pipeline.load_lora_weights(lora)
    return pipeline("a cat", generator=torch.Generator().manual_seed(0), **CALL).images


def test_names_are_those_that_sd_scripts_writes(folders, tmp_path):  # noqa: F811
    components = saved(folders["sd1"], tmp_path, train_text_encoder=True)
    tensors = load_file(tmp_path / KOHYA_LORA)
    for block, layers in LAYERS.items():
        found = [name for name in tensors if name.startswith(block)]
        ends = ("alpha", "lora_down.weight", "lora_up.weight")
        assert sorted(found) == sorted(f"{block}{layer}.{end}" for layer in layers for end in ends)
    # 4 blocks of 2 attentions and 2 layers of a text encoder, each of 4 layers, each of 3 tensors.
    assert len(tensors) == (4 * 2 + 2) * 4 * 3
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {t.item() for name, t in tensors.items() if name.endswith("alpha")} == {6.0}
    layer = components.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    for end, factor in (("down", layer.lora_A), ("up", layer.lora_B)):
        name = f"{ATTENTION_BLOCK}to_q.lora_{end}.weight"
        assert torch.equal(tensors[name], factor.default.weight)
    layer = components.text_encoder.encoder.layers[1].self_attn.k_proj
    name = f"{TEXT_BLOCK}self_attn_k_proj.lora_up.weight"
    assert torch.equal(tensors[name], layer.lora_B.default.weight)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("sd1", {"train_text_encoder": True}),
        ("sd2", {}),
        ("sdxl", {"train_text_encoder": True}),
        # Layers that are convolutions, or lie outside of the attention.
        ("sd1", {"lora_target_modules": OTHERS}),
        ("sdxl", {"lora_target_modules": OTHERS}),
    ],
    ids=["text encoder", "unet", "xl", "other layers", "other layers of xl"],
)
def test_diffusers_draws_the_same_from_both_files(kind, given, folders, tmp_path):  # noqa: F811
    saved(folders[kind], tmp_path, **given)
    ours, kohyas = (picture(folders[kind], tmp_path / name) for name in (LORA, KOHYA_LORA))
    np.testing.assert_allclose(kohyas, ours, atol=1e-6)
    assert np.abs(picture(folders[kind]) - ours).max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "given", "version", "v2"),
    [
        ("sd1", {}, "sd_v1", "False"),
        ("sd2", {}, "sd_v2_v", "True"),
        ("sd2", {"prediction_type": "epsilon"}, "sd_v2", "True"),
        ("sdxl", {}, "sdxl_base_v1-0", "False"),
    ],
)
def test_metadata_tells_rank_alpha_and_kind_of_model(
    kind, given, version, v2, folders, tmp_path  # noqa: F811
):  # fmt: skip
    saved(folders[kind], tmp_path, **given)
    with safe_open(tmp_path / KOHYA_LORA, framework="pt") as file:
        assert file.metadata() == {
            "ss_network_module": "networks.lora",
            "ss_network_dim": "4",
            "ss_network_alpha": "6.0",
            "ss_base_model_version": version,
            "ss_v2": v2,
        }


@pytest.mark.parametrize(
    ("diffusers", "sgm"),
    [
        ("conv_in", "input_blocks_0_0"),
        ("time_embedding_linear_2", "time_embed_2"),
        ("add_embedding_linear_1", "label_emb_0_0"),
        ("down_blocks_0_resnets_1_conv1", "input_blocks_2_0_in_layers_2"),
        ("down_blocks_0_downsamplers_0_conv", "input_blocks_3_0_op"),
        ("down_blocks_1_resnets_0_conv_shortcut", "input_blocks_4_0_skip_connection"),
        ("down_blocks_1_attentions_0_proj_in", "input_blocks_4_1_proj_in"),
        (
            "down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_out_0",
            "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0",
        ),
        ("mid_block_resnets_1_time_emb_proj", "middle_block_2_emb_layers_1"),
        (
            "mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
            "middle_block_1_transformer_blocks_0_attn1_to_q",
        ),
        ("up_blocks_0_attentions_2_proj_out", "output_blocks_2_1_proj_out"),
        ("up_blocks_0_upsamplers_0_conv", "output_blocks_2_2_conv"),
        ("up_blocks_1_attentions_0_proj_in", "output_blocks_3_1_proj_in"),
        ("up_blocks_2_resnets_2_conv2", "output_blocks_8_0_out_layers_3"),
        ("conv_out", "out_2"),
    ],
)
def test_layers_of_sdxl_are_named_as_in_its_original_code(diffusers, sgm):
    """By hand: SDXL has two residual blocks a level, three on the way up."""
    assert sgm_path(diffusers, layers=(2, 2, 2)) == sgm


@pytest.mark.parametrize(
    ("diffusers", "sgm"),
    [
        ("down_blocks_0_downsamplers_0_conv", "input_blocks_2_0_op"),
        ("down_blocks_1_resnets_1_conv1", "input_blocks_4_0_in_layers_2"),
        ("down_blocks_2_attentions_2_proj_in", "input_blocks_8_1_proj_in"),
        ("up_blocks_0_resnets_3_conv1", "output_blocks_3_0_in_layers_2"),
        ("up_blocks_0_upsamplers_0_conv", "output_blocks_3_2_conv"),
        ("up_blocks_1_upsamplers_0_conv", "output_blocks_6_2_conv"),
        ("up_blocks_2_resnets_1_conv1", "output_blocks_8_0_in_layers_2"),
    ],
)
def test_layers_are_counted_where_levels_have_unequal_numbers(diffusers, sgm):
    """By hand: one, two and three residual blocks, one more each on the way up, where it ends."""
    assert sgm_path(diffusers, layers=(1, 2, 3)) == sgm
