"""Noise, targets, losses and SNR weights against the formulas over alphas_cumprod."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from iet_sd.diffusion import add_noise_and_target, per_sample_loss, snr_weights

TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])


def make_scheduler(prediction_type: str, *, zero_terminal_snr: bool = False) -> DDPMScheduler:
    """The noise schedule of Stable Diffusion."""
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
    )


def draw_latents() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, len(TIMESTEPS), 4, 8, 8, generator=generator)
    return latents, noise


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noisy_latents_and_targets_equal_the_formulas(prediction_type, zero_terminal_snr):
    scheduler = make_scheduler(prediction_type, zero_terminal_snr=zero_terminal_snr)
    latents, noise = draw_latents()
    noisy, target = add_noise_and_target(scheduler, latents, noise, TIMESTEPS)
    for i, t in enumerate(TIMESTEPS.tolist()):
        signal = math.sqrt(scheduler.alphas_cumprod[t].item())
        spread = math.sqrt(1 - scheduler.alphas_cumprod[t].item())
        torch.testing.assert_close(noisy[i], signal * latents[i] + spread * noise[i])
        expected = noise[i]
        if prediction_type == "v_prediction":
            expected = signal * noise[i] - spread * latents[i]
        torch.testing.assert_close(target[i], expected)


def test_the_mean_of_the_losses_per_sample_is_the_usual_loss():
    prediction, target = draw_latents()
    loss_B = per_sample_loss(prediction, target)
    assert loss_B.shape == (len(TIMESTEPS),)
    for i in range(len(TIMESTEPS)):
        torch.testing.assert_close(loss_B[i], F.mse_loss(prediction[i], target[i]))
    torch.testing.assert_close(loss_B.mean(), F.mse_loss(prediction, target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_predictions_are_taken_in_single_precision(dtype):
    prediction, target = (tensor.to(dtype) for tensor in draw_latents())
    prediction = prediction * 300  # squares of it do not fit fp16
    loss_B = per_sample_loss(prediction, target)
    assert loss_B.dtype == torch.float32
    expected = ((prediction.double() - target.double()) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss_B.double(), expected, rtol=1e-5, atol=0)


def test_the_gradient_of_a_loss_reaches_its_own_sample_only():
    prediction, target = draw_latents()
    prediction.requires_grad_()
    per_sample_loss(prediction, target)[2].backward()
    expected = torch.zeros_like(prediction)
    expected[2] = 2 * (prediction[2] - target[2]).detach() / prediction[2].numel()
    torch.testing.assert_close(prediction.grad, expected)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 1e9])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_snr_weights_equal_the_formulas_over_diffusers_snr(prediction_type, gamma):
    scheduler = make_scheduler(prediction_type)
    snr = compute_snr(scheduler, TIMESTEPS).tolist()
    divisor = {"epsilon": 0, "v_prediction": 1}[prediction_type]
    expected = torch.tensor([min(value, gamma) / (value + divisor) for value in snr])
    weights = snr_weights(scheduler, TIMESTEPS, gamma)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("prediction_type", "last"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_snr_weights_are_finite_where_nothing_of_the_signal_is_left(prediction_type, last):
    scheduler = make_scheduler(prediction_type, zero_terminal_snr=True)
    assert compute_snr(scheduler, torch.tensor([999])).item() == 0
    weights = snr_weights(scheduler, TIMESTEPS, 5.0)
    assert weights.isfinite().all()
    assert weights[-1].item() == pytest.approx(last)
