"""Options of the loss: ``--method none`` with each is a plain loop with it, and what they cost."""

import pytest
import torch

from iet_sd.data.dataset import collate
from iet_sd.data.shards import visits
from iet_sd.engine.rounds import ShardDone
from iet_sd.engine.second_pass import Pending, prepare
from iet_sd.engine.step import Memory, accumulate_gradient
from iet_sd.errors import UserError
from iet_sd.method.agc import empty_bank
from tests.compare import equal
from tests.engine.plain import Plain
from tests.engine.running import LORA
from tests.engine.test_reduction import PLAIN, normal

OPTIONS = {
    "noise_offset": ({"noise_offset": 0.1}, {"noise_offset": 0.1}),
    "input_perturbation": ({"input_perturbation": 0.1}, {"input_perturbation": 0.1}),
    "snr_gamma": ({"snr_gamma": 5.0}, {"snr_gamma": 5.0}),
    "DREAM": ({"dream_training": True}, {"dream": 1.0}),
    "dream_detail_preservation": (
        {"dream_training": True, "dream_detail_preservation": 10.0},
        {"dream": 10.0},
    ),
    "all of them": (
        {
            "noise_offset": 0.1,
            "input_perturbation": 0.1,
            "snr_gamma": 5.0,
            "dream_training": True,
        },
        {"noise_offset": 0.1, "input_perturbation": 0.1, "snr_gamma": 5.0, "dream": 1.0},
    ),
}


@pytest.mark.parametrize(("given", "plain"), OPTIONS.values(), ids=OPTIONS)
def test_method_none_is_a_plain_loop_bit_for_bit(given, plain, train, pipelines, images):
    weights, _ = train(**PLAIN | given)
    expected = Plain(pipelines["sd1"], images, **plain).train(5).weights
    assert equal(weights, expected)
    assert not equal(weights, train(**PLAIN)[0])


@pytest.mark.parametrize("name", ["noise_offset", "input_perturbation", "snr_gamma"])
def test_so_it_is_for_models_that_predict_velocity(name, train, pipelines, images):
    given, plain = OPTIONS[name]
    weights, _ = train(kind="sd2", **PLAIN | given)
    assert equal(weights, Plain(pipelines["sd2"], images, **plain).train(5).weights)


def test_so_it_is_for_a_schedule_that_ends_in_noise(train, pipelines, images):
    """With min-SNR weights, which are 0 at its last step."""
    given, plain = OPTIONS["snr_gamma"]
    weights, _ = train(kind="sd2", **PLAIN | given, rescale_betas_zero_snr=True)
    plain = plain | {"scheduler": {"rescale_betas_zero_snr": True}}
    assert equal(weights, Plain(pipelines["sd2"], images, **plain).train(5).weights)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not equal(weights, train(kind="sd2", **PLAIN | given)[0])


@pytest.mark.parametrize("kind", ["sd1", "sd2"], ids=["epsilon", "v_prediction"])
def test_the_weighted_loss_of_pure_noise_is_finite(kind, settings, trainer_for):
    """At a signal-to-noise ratio of 0, where epsilon's weight is 0 / 0 written as it is usually."""
    trainer, _ = trainer_for(settings(kind=kind, snr_gamma=5.0, num_shards=1, msr=False))
    objective = trainer.objective
    scheduler = objective.components.noise_scheduler
    scheduler.alphas_cumprod[-1] = 0
    order = visits(0, 1, 0, range(16))
    batch = collate([trainer.dataset[next(order)] for _ in range(2)])
    timesteps = torch.tensor([999, 500])
    weighted = objective.weight(objective.loss(batch, timesteps, "score"), timesteps)
    assert weighted.isfinite().all()
    assert bool(weighted[0] > 0) is (kind == "sd1")
    weighted.sum().backward()
    assert all(p.grad.isfinite().all() for p in trainer.parameters.values())


@pytest.mark.parametrize("name", ["DREAM", "input_perturbation"])
def test_so_it_is_for_lora(name, train, pipelines, images):
    given, plain = OPTIONS[name]
    weights, _ = train(**PLAIN | LORA | given)
    assert equal(weights, Plain(pipelines["sd1"], images, rank=2, **plain).train(5).weights)


def test_dream_of_sdxl_tells_the_unet_all_that_training_does(settings, trainer_for):
    """The loss by hand, with sizes and pooled embeddings in both passes."""
    config = settings(kind="sdxl", num_shards=1, msr=False, dream_training=True)
    trainer, _ = trainer_for(config)
    objective, parts = trainer.objective, trainer.objective.components
    order = visits(0, 1, 0, range(16))
    batch = collate([trainer.dataset[next(order)] for _ in range(2)])
    timesteps, seeds = torch.tensor([900, 100]), batch["seed"].tolist()
    with torch.no_grad():
        loss_B = objective.loss(batch, timesteps, "score")
        latents = objective.encode_images(batch, "score/posterior")
        noise = normal(seeds, "score/noise", latents.shape[1:])
        noisy_latents = parts.noise_scheduler.add_noise(latents, noise, timesteps)
        told = parts.family.condition(parts, batch)
        level = (1 - parts.noise_scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)) ** 0.5
        error = (noise - parts.unet(noisy_latents, timesteps, **told).sample) * level
        prediction = parts.unet(noisy_latents + level * error, timesteps, **told).sample
    expected = (prediction - noise - error).square().flatten(1).mean(1)
    torch.testing.assert_close(loss_B, expected)


@pytest.mark.parametrize("mode", [{}, LORA], ids=["full", "lora"])
def test_gradients_are_clipped(mode, train, pipelines, images):
    """Also those of LoRA, which an iterator that was used up would leave as they are.

    With an epsilon that Adam's steps feel, so that they depend on the size of a gradient.
    """
    clipped = {"max_grad_norm": 1e-3, "adam_epsilon": 1.0, "learning_rate": 1.0}
    weights, _ = train(**PLAIN | mode | clipped)
    rank = mode.get("rank")
    expected = Plain(pipelines["sd1"], images, rank, **clipped).train(5).weights
    assert equal(weights, expected)
    free = clipped | {"max_grad_norm": 1e9}
    assert not equal(weights, train(**PLAIN | mode | free)[0])


@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3},
        {"lr_scheduler": "polynomial", "lr_power": 2.0},
        {"lr_scheduler": "linear"},
    ],
    ids=lambda given: given["lr_scheduler"],
)
def test_the_schedule_counts_updates_whatever_is_accumulated(schedule, train, pipelines, images):
    """Two batches an update, two rounds: as many steps of the schedule as of the optimizer."""
    given = PLAIN | {"num_rounds": 2, "steps_per_round": 4, "lr_warmup_steps": 2} | schedule
    weights, events = train(**given, gradient_accumulation_steps=2)
    # Twice the restarts are not the same.
    lr = {"name": schedule["lr_scheduler"], "num_warmup_steps": 2, "num_training_steps": 8}
    lr |= {"num_cycles": schedule.get("lr_num_cycles", 1), "power": schedule.get("lr_power", 1.0)}
    plain = Plain(pipelines["sd1"], images, lr=lr)
    for round in (1, 2):
        plain.train(4, round, batches_per_update=2)
    for name, tensor in plain.weights.items():
        assert torch.allclose(weights[name], tensor, atol=1e-5), name
    done = [event for event in events if isinstance(event, ShardDone)]
    assert done[-1].learning_rate == plain.lr_scheduler.get_last_lr()[0]


def test_dream_counts_the_pass_that_it_costs(train):
    """On a first and on a second, augmented pass."""
    given = {"num_shards": 1, "msr": False, "num_rounds": 1, "steps_per_round": 4}
    given |= {"bank_bins": 1, "taa_sharpness": 0.5, "score_pass": "train"}
    for dream, passes in ((False, 1), (True, 2)):
        _, events = train(**given, dream_training=dream)
        (done,) = [event for event in events if isinstance(event, ShardDone)]
        assert done.counts.augmented > 0
        assert done.counts.forward == passes * (done.counts.scored + done.counts.augmented)


@pytest.mark.parametrize("name", ["DREAM", "input_perturbation", "noise_offset"])
def test_agc_compares_the_loss_that_is_trained_on(name, settings, trainer_for, pipelines, images):
    """The bank gets the loss of a plain loop with the option, of every sample alone."""
    given, plain = OPTIONS[name]
    config = settings(num_shards=1, msr=False, bank_bins=1000, center_crop=True, **given)
    trainer, state = trainer_for(config)
    order = visits(0, 1, 0, range(16))
    seen = [next(order) for _ in range(4)]
    memory, proxy = Memory(empty_bank(1000)), state.proxies[0]
    batch = collate([trainer.dataset[visit] for visit in seen])
    accumulate_gradient(
        trainer.objective, batch, memory, config.method, trainer.dataset, proxy.backward, print
    )
    loop = Plain(pipelines["sd1"], images, **plain)
    timesteps = trainer.objective.draw_timesteps([v.seed for v in seen], "score/timestep")
    for visit, timestep in zip(seen, timesteps.tolist(), strict=True):
        loss = loop.loss([visit]).item()
        # An entry of the bank after one visit: (1 - decay) loss.
        assert memory.bank.value_T[timestep].item() == pytest.approx(0.2 * loss, rel=1e-4)


@pytest.mark.parametrize("name", ["DREAM", "input_perturbation"])
def test_the_second_pass_has_the_option_too(name, settings, trainer_for):
    """The augmented images' loss is not that without it, and is derived from the seeds alone."""
    given, _ = OPTIONS[name]
    losses = []
    for options in ({}, given, given):
        config = settings(num_shards=1, msr=False, **options)
        trainer, _ = trainer_for(config)
        taken = [Pending(i, 500, 100 + i, 0.5) for i in range(3)]
        (seen,) = prepare(trainer.objective, taken, config.method, trainer.dataset)
        losses.append(trainer.objective.loss_of(seen).detach())
    assert not torch.isclose(losses[0], losses[1], rtol=1e-6).any()
    assert torch.equal(losses[1], losses[2])


def test_dream_leaves_every_gradient_under_autocast(settings, trainer_for):
    """Weights that autocast has cast for the pass without gradient have one in the next."""
    config = settings(**PLAIN, dream_training=True)
    trainer, _ = trainer_for(config)
    trainer.objective.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    order = visits(0, 1, 0, range(16))
    batch = collate([trainer.dataset[next(order)] for _ in range(4)])
    timesteps = torch.tensor([10, 200, 500, 900])
    trainer.objective.loss(batch, timesteps, "score").sum().backward()
    without = [name for name, p in trainer.parameters.items() if p.grad is None or not p.grad.any()]
    trainer.objective.dream = None
    for parameter in trainer.parameters.values():
        parameter.grad = None
    trainer.objective.loss(batch, timesteps, "score").sum().backward()
    expected = [
        name for name, p in trainer.parameters.items() if p.grad is None or not p.grad.any()
    ]
    assert without == expected


def test_dream_of_a_model_that_predicts_no_noise_is_refused(settings, trainer_for):
    config = settings(kind="sd2", dream_training=True)
    with pytest.raises(UserError, match=r"predict noise.*v_prediction"):
        trainer_for(config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", [{}, LORA], ids=["full", "lora"])
def test_accumulation_equals_a_larger_batch_in_16_bits(mode, dtype, settings, trainer_for):
    """Under autocast, and with the loss scale of fp16; up to what 16 bits give."""
    results = []
    for batch_size, batches in ((2, 2), (4, 1)):
        given = {"train_batch_size": batch_size, "gradient_accumulation_steps": batches}
        given |= {"mixed_precision": "fp16" if dtype == torch.float16 else "bf16"}
        # A step in proportion to the gradient, which Adam alone would not make.
        given |= {"adam_epsilon": 1.0, "learning_rate": 0.1, "steps_per_round": 3}
        trainer, state = trainer_for(settings(**PLAIN | mode | given))
        trainer.objective.autocast = lambda: torch.autocast("cpu", dtype)
        assert state.proxies[0].scaler.is_enabled() is (dtype == torch.float16)
        before = dict(state.weights)
        events = list(trainer.run(state))
        assert events[-2].counts.updates == 3
        results.append({n: t - before[n] for n, t in state.weights.items()})
    for name, change in results[0].items():
        assert change.dtype == torch.float32
        norm = results[1][name].norm()
        assert (change - results[1][name]).norm() <= 0.1 * norm + 1e-5, name
    assert sum(change.norm() for change in results[0].values()) > 1e-3
