import pytest
import torch

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models.adapter import lora_pairs, make_trainable
from iet_sd.models.loading import load_components
from tests.pipelines import TEXT_WIDTH, tiny_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipeline(base / kind, kind=kind) for kind in ("sd1", "sd2")}


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
