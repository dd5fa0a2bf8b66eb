"""Where the time of a step goes: clocks, and profiles of short runs."""

import pytest

from benchmarks.throughput import clocks, parts, rows
from benchmarks.throughput.peer_parts import PEER_PARTS, peer_profile


def test_time_is_of_the_innermost_part(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 8.0, 13.0, 15.0])
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(now))
    clock = clocks.Clock()
    with clock.within("outer"):  # at 0
        with clock.within("inner"):  # from 1 to 3
            pass
        assert clock.seconds == {"outer": 1.0, "inner": 2.0}
        clock.restart()  # at 7
        with clock.within("inner"):  # from 8 to 13
            pass
    assert clock.seconds == {"outer": 1.0 + 2.0, "inner": 5.0}


def test_a_function_that_is_gone_is_named(monkeypatch):
    gone = (("data", "iet_sd.data.dataset:Loader.gone"),)
    monkeypatch.setattr(parts, "PARTS", gone)
    with pytest.raises(SystemExit, match=r"Loader\.gone is gone"):
        parts.profile([], 0)


def test_a_profile_of_a_short_run(argv):
    """Of the tiny pipeline, whose parts are all there, and whose functions are theirs after it."""
    before = {place: clocks._find(place)[2] for _, place in parts.PARTS}
    flags = argv(num_rounds=3, steps_per_round=1, cache="off", checkpointing_rounds=0)
    found = parts.profile(flags, warm_up=1)
    assert {place: clocks._find(place)[2] for _, place in parts.PARTS} == before
    # Of two proxies and two rounds.
    assert found.steps == 4
    assert 0 < found.trained <= 16
    shares = found.shares()
    assert sum(shares.values()) == pytest.approx(1)
    there = {part for part, share in shares.items() if share > 0}
    assert there | {clocks.SCORING} == set(parts.NAMES)
    assert shares["backward"] > shares["method"]
    text = parts.table({"d": found})
    assert f"| backward | {shares['backward']:.1%} |" in text


# What diffusers' script does in a step, with seconds that pass before, in the loop, and after it.
STAND_IN = """
import sys
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from benchmarks.throughput import clocks

model, steps = sys.argv[1], int(sys.argv[2])
vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
accelerator = Accelerator(cpu=True)
optimizer = torch.optim.AdamW(unet.parameters())
unet, optimizer, loader, lr_scheduler = accelerator.prepare(
    unet,
    optimizer,
    torch.utils.data.DataLoader(torch.zeros(2 * steps, 3, 32, 32), batch_size=2),
    torch.optim.lr_scheduler.ConstantLR(optimizer),
)
clocks.time.pass_("before", 100)
for pixels in loader:
    latents = vae.encode(pixels).latent_dist.sample()
    timesteps = torch.zeros(2, dtype=torch.int64)
    noisy = scheduler.add_noise(latents, torch.randn_like(latents), timesteps)
    states = text_encoder(torch.zeros(2, 16, dtype=torch.int64), return_dict=False)[0]
    loss = torch.nn.functional.mse_loss(unet(noisy, timesteps, states).sample, latents)
    accelerator.gather(loss)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
    clocks.time.pass_("in the loop", 3)
    optimizer.step()
    lr_scheduler.step()
    optimizer.zero_grad()
    accelerator.log({"loss": loss.item()})
clocks.time.pass_("after", 1000)
"""


class FakeTime:
    """Seconds that pass when it is said so, and one in every part's every turn."""

    def __init__(self):
        self.now = 0.0

    def pass_(self, _, seconds):
        self.now += seconds

    def perf_counter(self):
        self.now += 1.0
        return self.now


def test_a_profile_of_the_peer_is_of_its_steps_alone(pipelines, tmp_path, monkeypatch):
    before = {place: clocks._find(place)[2] for _, place in PEER_PARTS}
    monkeypatch.setattr(clocks, "time", FakeTime())
    script = tmp_path / rows.PEERS["full"]
    script.write_text(STAND_IN)
    found = peer_profile(script, [str(pipelines["sd1"]), "5"], warm_up=2, steps=3, batch_size=2)
    assert {place: clocks._find(place)[2] for _, place in PEER_PARTS} == before
    assert (found.steps, found.trained) == (3, 6)
    seconds = found.clock.seconds
    # 3 in the loop in each of 3 steps; nothing of before and after.
    assert 9 <= seconds[clocks.REST] < 9 + 100
    assert {part for part in seconds if seconds[part]} == {part for part, _ in PEER_PARTS} | {
        clocks.REST
    }
    # One encoding and one latent a step, a second each.
    assert seconds["VAE, latents"] == 3 * 2
    assert seconds["text"] == seconds[clocks.UNET] == seconds["backward"] == 3
