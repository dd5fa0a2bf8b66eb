import importlib.util
import logging
import sys
import types

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor
from torch.profiler import ProfilerActivity, profile

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models import attention
from iet_sd.models.attention import KernelProcessor, check_attention, enable_attention
from tests.pipelines import TEXT_WIDTH, tiny_pipeline

CPU = torch.device("cpu")


FLASH, MATH = (
    f"aten::_scaled_dot_product_{name}" for name in ("flash_attention_for_cpu", "attention_math")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def unet(folder):
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def run(unet):
    """A forward and backward pass: the operators it called, output and a gradient."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 4, 4, generator=generator)
    text = torch.randn(1, 16, TEXT_WIDTH, generator=generator)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        output = unet(latents, torch.tensor([7]), text).sample
        output.square().sum().backward()
    names = [event.name for event in found.events()]
    return names, output.detach(), next(unet.parameters()).grad.clone()


def install(monkeypatch, operator):
    """An importable package `xformers` with the given operator."""
    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = operator
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def no_kernel(query, key, value):
    raise NotImplementedError("No operator found")


def no_gradient(query, key, value):
    """Runs forward, but is of no use in training."""
    return query.detach()


def report(query, key, value):
    raise ValueError(f"{query.dtype} {tuple(query.shape)}")


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_sdpa_is_what_the_unet_has(unet, backend):
    check_attention(backend)
    assert enable_attention(unet, backend, CPU, torch.float32) == "sdpa"
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.skipif(
    importlib.util.find_spec("xformers") is not None and torch.cuda.is_available(),
    reason="xformers may work here",
)
def test_xformers_is_refused_before_loading_where_it_cannot_work():
    reason = "not installed" if importlib.util.find_spec("xformers") is None else "no CUDA GPU"
    with pytest.raises(UserError, match=rf"{reason}.*requirements-xformers\.txt"):
        check_attention("xformers")


@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        (no_kernel, "NotImplementedError: No operator found"),
        (no_gradient, "RuntimeError: element 0 of tensors does not require grad"),
    ],
)
def test_operator_is_run_and_its_failure_is_no_silent_fallback(monkeypatch, unet, operator, reason):
    install(monkeypatch, operator)
    with pytest.raises(UserError, match=rf"because {reason}"):
        enable_attention(unet, "xformers", CPU, torch.bfloat16)
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}


def test_probe_uses_the_training_dtype_and_the_largest_head(monkeypatch, unet):
    install(monkeypatch, report)
    # 8 or 16 channels on 2 heads.
    with pytest.raises(UserError, match=r"ValueError: torch.bfloat16 \(1, 16, 2, 8\)"):
        enable_attention(unet, "xformers", CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("backend", "used", "unused"), [("flash", FLASH, MATH), ("math", MATH, FLASH)]
)
def test_a_kernel_asked_for_is_the_one_that_runs(backend, used, unused, unet):
    """Also where activations are computed again; and nowhere else."""
    _, expected, gradient = run(unet)
    unet.zero_grad()
    assert enable_attention(unet, backend, CPU, torch.float32) == backend
    names, output, own = run(unet)
    assert names.count(used) == len(unet.attn_processors)
    assert unused not in names
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(own, gradient)

    unet.enable_gradient_checkpointing()
    unet.train().zero_grad()
    names, _, again = run(unet)
    layers = [name for name in unet.attn_processors if "mid_block" not in name]
    assert names.count(used) >= len(unet.attn_processors) + len(layers)
    assert unused not in names
    torch.testing.assert_close(again, gradient)

    # Outside of the UNet every kernel is allowed as before.
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()


def test_lora_on_a_unet_with_a_kernel_trains(unet):
    from peft import LoraConfig

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="gaussian"))
    enable_attention(unet, "math", CPU, torch.float32)
    unet(
        torch.randn(1, 4, 4, 4), torch.tensor([7]), torch.randn(1, 16, TEXT_WIDTH)
    ).sample.sum().backward()
    assert all(p.grad is not None for n, p in unet.named_parameters() if "lora_B" in n)


def test_a_kernel_that_does_not_work_here_is_an_error(unet, monkeypatch):
    """Whatever is asked for is tried once, in the dtype of training."""

    def fail(query, key, value):
        raise RuntimeError(f"no kernel for {query.dtype}")

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", fail)
    with pytest.raises(UserError, match=r"--attention_backend flash.*no kernel for torch.float16"):
        enable_attention(unet, "flash", CPU, torch.float16)
    assert not any(isinstance(p, KernelProcessor) for p in unet.attn_processors.values())


GPU = types.SimpleNamespace(type="cuda")


@pytest.mark.parametrize("works", [True, False])
def test_auto_on_a_gpu_is_xformers_where_it_works(works, unet, monkeypatch, caplog):
    """The probe alone is stood in for, since there is no GPU to run it on."""
    install(monkeypatch, report)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        unet, "enable_xformers_memory_efficient_attention", lambda: unet.set_attn_processor(swapped)
    )
    swapped, tried = XFormersAttnProcessor(), []
    caplog.set_level(logging.INFO, "iet_sd.models.attention")

    def failure(attend, head_size, device, dtype):
        tried.append((head_size, device, dtype))
        return None if works else "NotImplementedError: No operator found"

    monkeypatch.setattr(attention, "_failure", failure)
    assert enable_attention(unet, "auto", GPU, torch.float16) == ("xformers" if works else "sdpa")
    assert tried == [(8, GPU, torch.float16)]
    types_found = {type(p) for p in unet.attn_processors.values()}
    assert types_found == {XFormersAttnProcessor if works else AttnProcessor2_0}
    assert len(caplog.messages) == (not works)
    assert ("No operator found" in caplog.text) == (not works)


def test_auto_says_why_it_is_not_xformers(unet, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    caplog.set_level(logging.INFO, "iet_sd.models.attention")
    assert enable_attention(unet, "auto", GPU, torch.float16) == "sdpa"
    assert caplog.messages == [
        "attention by SDPA: xformers does not work here, because it is not installed"
    ]


def test_the_flag_of_diffusers_is_a_backend():
    def config(**given):
        return ModelConfig(pretrained_model_name_or_path="name/model", **given)

    flag = {"enable_xformers_memory_efficient_attention": True}
    assert config(**flag).attention_backend == "xformers"
    assert config(**flag, attention_backend="xformers") == config(**flag)
    for other in ("sdpa", "flash", "math"):
        with pytest.raises(UserError, match=f"attention_backend {other} is given"):
            config(**flag, attention_backend=other)
    assert config().attention_backend == "auto"
