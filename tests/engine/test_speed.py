"""What makes a run faster changes no more than rounding, and nothing of what is saved."""

import shutil
from typing import get_args

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models import speed
from iet_sd.models.saving import save_result
from iet_sd.models.speed import check_compile, memory_format, place
from tests.compare import equal
from tests.engine import running

CPU = torch.device("cpu")
KERNEL = {"lora_target_modules": ("to_q", "conv1", "conv_shortcut")}
MODES = {"full": {}, "lora": running.LORA | KERNEL}
# Augmented passes of a few samples, averages, skips, and all that is kept between turns.
RUN = running.RUN | {"num_rounds": 2, "use_ema": True, "proxy_optimizer": "average"}


@pytest.fixture
def placed(trainer_for):
    """As `trainer_for`, with the networks placed as the command line places them."""

    def make(config, store=None):
        trainer, state = trainer_for(config, store)
        place(trainer.objective.components, config, CPU)
        return trainer, state

    return make


def near(one, other, atol):
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], atol=atol) for name in one
    )


def strides(module):
    return {name: p.stride() for name, p in module.named_parameters()}


def test_on_a_cpu_nothing_changes_unless_asked_for(settings, placed, trainer_for):
    trainer, _ = placed(settings())
    other, _ = trainer_for(settings())
    for part in ("unet", "vae"):
        modules = [getattr(t.objective.components, part) for t in (trainer, other)]
        assert strides(modules[0]) == strides(modules[1])
        assert modules[0]._compiled_call_impl is None


def test_a_gpu_has_it_by_default_but_not_with_moments_of_8_bits(settings):
    """Whose kernel goes by address through weights that it has made contiguous."""
    cuda = torch.device("cuda")
    assert memory_format(settings(), cuda) is torch.channels_last
    assert memory_format(settings(channels_last=False), cuda) is torch.preserve_format
    assert memory_format(settings(use_8bit_adam=True), cuda) is torch.preserve_format
    with pytest.raises(UserError, match=r"--use_8bit_adam .*--channels_last.*give one of them"):
        settings(use_8bit_adam=True, channels_last=True)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_channels_last_trains_the_same_model(mode, fused, settings, placed):
    """With kernels that go through weights, gradients and moments by address, too."""
    found = {}
    for channels_last in (False, True):
        given = RUN | mode | {"channels_last": channels_last, "fused_adamw": fused}
        trainer, state = placed(settings(**given))
        parts = trainer.objective.components
        for kernel in (parts.unet.conv_in.weight, parts.vae.encoder.conv_in.weight):
            assert kernel.is_contiguous(memory_format=torch.channels_last) is channels_last
        list(trainer.run(state))
        found[channels_last] = state
        waiting = [state.weights, state.ema, state.moments]
        waiting += [proxy.tensors() for proxy in state.proxies.values()]
        assert all(t.is_contiguous() for tensors in waiting for t in tensors.values())
    assert near(found[True].weights, found[False].weights, atol=1e-4)
    assert near(found[True].ema, found[False].ema, atol=1e-4)
    assert not equal(found[True].weights, placed(settings(**RUN, **mode))[1].weights)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_channels_last_is_resumed_exactly(mode, settings, placed, tmp_path):
    config = settings(**RUN, **mode, channels_last=True, fused_adamw=True, checkpointing_steps=2)
    trainer, state = placed(config)
    list(trainer.run(state))
    running.run(config, tmp_path / "stopped", placed, stop_at=12)
    again, resumed = running.run(running.resuming(config), tmp_path / "stopped", placed)
    assert equal(running.weights(again), running.weights(trainer))
    assert equal(resumed.ema, state.ema)
    assert equal(resumed.moments, state.moments)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_channels_last_is_saved_as_any_other(mode, settings, placed, tmp_path):
    saved = []
    for channels_last in (False, True):
        config = settings(**mode, channels_last=channels_last)
        trainer, _ = placed(config)
        folder = tmp_path / str(channels_last)
        save_result(trainer.objective.components, config.model, folder)
        saved += [{path.name: load_file(path) for path in sorted(folder.rglob("*.safetensors"))}]
    assert saved[0].keys() == saved[1].keys()
    assert all(equal(saved[0][name], saved[1][name]) for name in saved[0])
    if not mode:
        unet = StableDiffusionPipeline.from_pretrained(folder).unet
        assert equal(dict(unet.named_parameters()), trainer.parameters)


def test_compilation_takes_nothings_place(settings, placed):
    """The UNet is the same module, with the names and parameters that training has."""
    trainer, _ = placed(settings(torch_compile=True))
    unet = trainer.objective.components.unet
    assert unet._compiled_call_impl is not None
    assert dict(unet.named_parameters()).keys() == trainer.parameters.keys()
    assert all(p is trainer.parameters[name] for name, p in unet.named_parameters())


def test_what_compilation_lacks_is_said_in_one_line(settings):
    config = settings(torch_compile=True).model
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(UserError, match=r"^--torch_compile .*apt-get install g\+\+") as error:
            check_compile(config, CPU)
        assert "\n" not in str(error.value)
        check_compile(settings().model, CPU)


def test_no_way_to_compile_writes_over_a_gradient():
    """CUDA graphs do: an update may have several backward passes, which add to one gradient."""
    modes = get_args(ModelConfig.__annotations__["torch_compile_mode"])
    assert "default" in modes
    for mode in modes:
        assert not torch._inductor.list_mode_options(mode).get("triton.cudagraphs")


def test_sizes_and_passes_have_graphs_of_their_own(settings, placed, monkeypatch):
    """More than the 8 that there may be otherwise, and not fewer than someone has set."""
    config = torch._dynamo.config
    for before, after in ((8, speed.GRAPHS), (1000, 1000)):
        monkeypatch.setattr(config, "recompile_limit", before)
        placed(settings(torch_compile=True))
        assert config.recompile_limit == after


def test_how_to_compile_needs_compilation(settings):
    with pytest.raises(UserError, match="--torch_compile_mode says how --torch_compile works"):
        settings(torch_compile_mode="max-autotune-no-cudagraphs")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_compiled_run_is_the_same_to_rounding(mode, settings, placed):
    """Through turns, second passes of other sizes, and drawing in between."""
    found = {}
    for torch_compile in (False, True):
        given = running.RUN | mode | {"num_rounds": 2, "torch_compile": torch_compile}
        config = settings(**given)
        check_compile(config.model, CPU)
        trainer, state = placed(config)
        unet = trainer.objective.components.unet
        for number, _ in enumerate(trainer.run(state)):
            if number == 4:
                unet.eval()
                with torch.no_grad():
                    text = torch.zeros(2, 16, unet.config.cross_attention_dim)
                    drawn = unet(torch.zeros(2, 4, 4, 4), 3, text).sample
                unet.train()
        found[torch_compile] = running.weights(trainer) | {"drawn": drawn}
        names = [*unet.state_dict()]
    assert not any("_orig_mod" in name for name in names)
    assert near(found[True], found[False], atol=1e-4)
