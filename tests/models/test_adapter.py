import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models.adapter import (
    adapter_layers,
    lora_pairs,
    make_trainable,
    of_text_encoder,
)
from iet_sd.models.loading import load_components
from tests.pipelines import TEXT_WIDTH, tiny_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipeline(base / kind, kind=kind) for kind in ("sd1", "sd2", "sdxl")}


def prepare(folder, dtype=torch.float32, seed=0, **settings):
    """Components and what of them is trainable."""
    config = ModelConfig(pretrained_model_name_or_path=str(folder), **settings)
    components = load_components(config, dtype, cache_dir=None)
    return components, make_trainable(components, config, seed)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 4, 4, generator=generator).to(dtype),
        "timestep": torch.tensor([10, 900]),
        "encoder_hidden_states": torch.randn(2, 16, TEXT_WIDTH, generator=generator).to(dtype),
    }


def test_full_trains_every_weight_of_the_unet_and_nothing_else(folders):
    components, parameters = prepare(folders["sd1"], torch.bfloat16)
    assert list(parameters) == [name for name, _ in components.unet.named_parameters()]
    assert all(p is components.unet.get_parameter(name) for name, p in parameters.items())
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert components.unet.training
    frozen = [*components.vae.parameters(), *components.text_encoder.parameters()]
    assert not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lora_parameters_are_fp32_beside_a_frozen_unet(folders, kind, dtype):
    components, parameters = prepare(folders[kind], dtype, train_mode="lora", rank=3)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    base = [p for name, p in components.unet.named_parameters() if name not in parameters]
    assert {p.dtype for p in base} == {dtype}
    assert not any(p.requires_grad for p in base)
    # 4 transformer blocks (1 down, 1 mid, 2 up) of 2 attentions, each 4 layers of 2 factors.
    assert len(parameters) == 4 * 2 * 4 * 2


def test_lora_has_gradients_on_a_bf16_unet(folders):
    components, parameters = prepare(folders["sd1"], torch.bfloat16, train_mode="lora")
    components.unet(**inputs(torch.bfloat16)).sample.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in parameters.values())
    pairs = lora_pairs(parameters)
    # B = 0 at the start, so no gradient passes through it to A.
    assert all(parameters[a].grad.abs().max() == 0 for a, _ in pairs)
    assert all(parameters[b].grad.abs().max() > 0 for _, b in pairs)


def test_lora_starts_at_the_model_and_is_scaled_by_alpha_over_rank(folders):
    plain, _ = prepare(folders["sd1"])
    components, parameters = prepare(folders["sd1"], train_mode="lora", rank=4, lora_alpha=8.0)
    unet = components.unet
    assert torch.equal(unet(**inputs()).sample, plain.unet(**inputs()).sample)

    (a, b), *_ = lora_pairs(parameters)
    assert parameters[a].shape[0] == parameters[b].shape[1] == 4
    torch.nn.init.normal_(parameters[b])
    layer = unet.get_submodule(a.split(".lora_A.")[0])
    x = torch.randn(3, layer.in_features)
    expected = layer.base_layer(x) + 2.0 * x @ parameters[a].T @ parameters[b].T
    torch.testing.assert_close(layer(x), expected)


def test_initial_factors_depend_on_the_seed_alone(folders):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _, first = prepare(folders["sd1"], train_mode="lora", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    _, again = prepare(folders["sd1"], train_mode="lora", seed=1)
    _, other = prepare(folders["sd1"], train_mode="lora", seed=2)
    assert list(first) == list(again)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[a], other[a]) for a, _ in lora_pairs(first))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_text_encoders_are_trained_in_fp32_under_names_of_their_own(folders, kind, mode, dtype):
    """After the UNet's, whose names and initial values are as without."""
    given = {"train_mode": mode} | ({"rank": 3} if mode == "lora" else {})
    _, alone = prepare(folders[kind], dtype, **given)
    components, parameters = prepare(folders[kind], dtype, train_text_encoder=True, **given)
    assert list(parameters)[: len(alone)] == list(alone)
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in alone.items())
    found = dict(list(parameters.items())[len(alone) :])
    assert all(map(of_text_encoder, found))
    assert not any(map(of_text_encoder, alone))
    for part in components.family.text_encoders:
        encoder = getattr(components, part)
        mine = {n: p for n, p in found.items() if n.startswith(f"{part}.")}
        for name, p in mine.items():
            assert p is encoder.get_parameter(name.removeprefix(f"{part}."))
            assert p.dtype == torch.float32
        frozen = [p for p in encoder.parameters() if not p.requires_grad]
        assert encoder.training
        if mode == "lora":
            # 4 layers of 2 factors in each attention.
            assert len(mine) == encoder.config.num_hidden_layers * 4 * 2
            assert {p.dtype for p in frozen} == {dtype}
        else:
            assert (len(mine), frozen) == (len(list(encoder.parameters())), [])
    assert not any(p.requires_grad for p in components.vae.parameters())


def test_a_trained_text_encoder_starts_from_all_the_digits_that_are_stored(folders):
    """Loaded in bf16 and cast to fp32 it would start elsewhere."""
    components, _ = prepare(folders["sd1"], torch.bfloat16, train_text_encoder=True)
    stored = load_file(folders["sd1"] / "text_encoder" / "model.safetensors")
    for name, parameter in components.text_encoder.named_parameters():
        assert torch.equal(parameter, stored[name]), name


DORA = {"train_mode": "lora", "rank": 3, "lora_alpha": 6.0, "use_dora": True}
LAYERS = ("to_q", "conv1", "proj_in")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dora_starts_at_the_lengths_of_the_rows(folders, dtype):
    """In fp32, whatever the weights are in: by numpy in double precision."""
    components, parameters = prepare(
        folders["sd1"], dtype, train_text_encoder=True, lora_target_modules=LAYERS, **DORA
    )
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    for network in (components.unet, components.text_encoder):
        assert adapter_layers(network)
        for name, layer in adapter_layers(network).items():
            weight = layer.base_layer.weight.detach().double().numpy()
            expected = np.linalg.norm(weight.reshape(len(weight), -1), axis=1)
            found = layer.lora_magnitude_vector["default"].weight.detach().flatten().numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)


def test_dora_starts_at_the_model(folders):
    plain, _ = prepare(folders["sd1"])
    components, _ = prepare(folders["sd1"], lora_target_modules=LAYERS, **DORA)
    expected = plain.unet(**inputs()).sample
    torch.testing.assert_close(components.unet(**inputs()).sample, expected, rtol=0, atol=1e-5)


def test_dora_is_rows_of_the_trained_lengths_in_the_directions_of_lora(folders):
    """By hand: y = m V x / |V| of each row of V = W + (alpha / rank) B A."""
    components, parameters = prepare(folders["sd1"], **DORA)
    (a, b), *_ = lora_pairs(parameters)
    m = a.replace("lora_A", "lora_magnitude_vector")
    torch.nn.init.normal_(parameters[b])
    torch.nn.init.uniform_(parameters[m])
    layer = components.unet.get_submodule(a.split(".lora_A.")[0])
    x = torch.randn(5, layer.in_features)
    V = layer.base_layer.weight + 2.0 * parameters[b] @ parameters[a]
    expected = parameters[m] * (x @ V.T) / V.norm(dim=1)
    if layer.base_layer.bias is not None:
        expected += layer.base_layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_all_parts_of_dora_are_trained_and_its_lengths_are_in_no_pair(folders):
    components, parameters = prepare(folders["sd1"], lora_target_modules=LAYERS, **DORA)
    components.unet(**inputs()).sample.square().mean().backward()
    pairs = lora_pairs(parameters)
    assert len(parameters) == 3 * len(pairs)
    lengths = set(parameters) - {name for pair in pairs for name in pair}
    assert all(parameters[name].grad.abs().max() > 0 for name in lengths)
    assert all("lora_magnitude_vector" in name for name in lengths)


@pytest.mark.parametrize("flag", ["use_dora", "save_kohya_lora", "merge_lora"])
def test_what_only_a_lora_has_is_refused_without_one(flag):
    with pytest.raises(UserError, match=f"--{flag} needs --train_mode lora; got full"):
        ModelConfig(pretrained_model_name_or_path="name/model", **{flag: True})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_aggregation": "product"}, "Use --lora_aggregation factors"),
        ({"save_kohya_lora": True}, "cannot hold a DoRA.* --merge_lora"),
    ],
)
def test_what_cannot_be_done_with_dora_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(pretrained_model_name_or_path="name/model", **DORA, **given)


def test_dropout_reaches_the_layers(folders):
    components, _ = prepare(folders["sd1"], train_mode="lora", lora_dropout=0.3)
    found = [m.p for n, m in components.unet.named_modules() if n.endswith("lora_dropout.default")]
    assert found == [0.3] * 32


def test_pairs_hold_every_name_once_and_share_a_layer(folders):
    _, parameters = prepare(
        folders["sd2"], train_mode="lora", lora_target_modules=("conv1", "to_q")
    )
    pairs = lora_pairs(parameters)
    assert sorted(name for pair in pairs for name in pair) == sorted(parameters)
    for a, b in pairs:
        assert a.split(".lora_A.") == b.split(".lora_B.")


@pytest.mark.parametrize("target", ["to_z", "attn1", "o_q"])
def test_target_without_a_layer_is_refused_with_the_real_names(folders, target):
    with pytest.raises(UserError, match=f"'{target}' matches no") as caught:
        prepare(folders["sd1"], train_mode="lora", lora_target_modules=("to_q", target))
    names = str(caught.value).partition("that do: ")[2].rstrip(".").split(", ")
    assert {"to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "linear_1"} <= set(names)
    # Each listed name works.
    prepare(folders["sd1"], train_mode="lora", lora_target_modules=tuple(names))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_gradient_checkpointing_gives_the_same_gradients(folders, mode):
    def gradients(**settings):
        components, parameters = prepare(folders["sd1"], train_mode=mode, **settings)
        components.unet(**inputs()).sample.square().mean().backward()
        return components.unet, {name: p.grad for name, p in parameters.items()}

    _, plain = gradients()
    unet, checkpointed = gradients(gradient_checkpointing=True)
    assert unet.is_gradient_checkpointing
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
