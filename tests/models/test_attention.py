import importlib.util
import sys
import types

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

from iet_sd.errors import UserError
from iet_sd.models.attention import check_attention, enable_attention
from tests.pipelines import tiny_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    folder = tiny_pipeline(tmp_path_factory.mktemp("pipeline"))
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


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


def test_sdpa_is_what_the_unet_has(unet):
    check_attention(False)
    assert enable_attention(unet, False, CPU, torch.float32) == "sdpa"
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.skipif(
    importlib.util.find_spec("xformers") is not None and torch.cuda.is_available(),
    reason="xformers may work here",
)
def test_xformers_is_refused_before_loading_where_it_cannot_work():
    reason = "not installed" if importlib.util.find_spec("xformers") is None else "no CUDA GPU"
    with pytest.raises(UserError, match=rf"{reason}.*requirements-xformers\.txt"):
        check_attention(True)


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
        enable_attention(unet, True, CPU, torch.bfloat16)
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}


def test_probe_uses_the_training_dtype_and_the_largest_head(monkeypatch, unet):
    install(monkeypatch, report)
    # 8 or 16 channels on 2 heads.
    with pytest.raises(UserError, match=r"ValueError: torch.bfloat16 \(1, 16, 2, 8\)"):
        enable_attention(unet, True, CPU, torch.bfloat16)
