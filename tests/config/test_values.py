"""Values that cannot be, each by its rule, and those at the edge of what can."""

import pytest

from iet_sd.arguments import from_layers
from iet_sd.errors import UserError
from tests.config.needed import NEEDED

MISTAKES = [
    ({"rank": 0}, "--rank must be above 0; got 0"),
    ({"lora_dropout": 1.0}, "--lora_dropout"),
    ({"lora_dropout": -0.1}, "--lora_dropout"),
    ({"lora_alpha": 0.0}, "--lora_alpha"),
    ({"lora_target_modules": ()}, "--lora_target_modules"),
    ({"resolution": 0}, "--resolution must be above 0"),
    ({"resolution": 100}, "--resolution must be a multiple of 8; got 100"),
    ({"train_batch_size": 0}, "--train_batch_size"),
    ({"dataloader_num_workers": -1}, "--dataloader_num_workers"),
    ({"max_train_samples": 0}, "--max_train_samples"),
    ({"dataset_name": "some/pictures", "train_data_dir": "pictures"}, "data once"),
    ({"dataset_name": None, "train_data_dir": None}, "data once"),
    ({"num_shards": 0}, "--num_shards"),
    ({"num_rounds": 0}, "--num_rounds"),
    ({"bank_bins": 0}, "--bank_bins"),
    ({"bank_bins": 1001}, "--bank_bins must be at most 1000"),
    ({"aggregate_every": 0}, "--aggregate_every"),
    ({"msr_every": 0}, "--msr_every"),
    ({"taa_num_ops": 0}, "--taa_num_ops"),
    ({"agc_threshold": -0.1}, "--agc_threshold"),
    ({"taa_sharpness": -1.0}, "--taa_sharpness"),
    ({"taa_magnitude": -1.0}, "--taa_magnitude"),
    ({"taa_magnitude": 31.0}, "--taa_magnitude must be at most 30"),
    ({"taa_min_strength": -0.1}, "--taa_min_strength"),
    ({"msr_min_skips": -1}, "--msr_min_skips"),
    ({"steps_per_round": 0}, "--steps_per_round"),
    ({"bank_decay": 1.0}, "--bank_decay must lie in [0, 1)"),
    ({"bank_decay": -0.1}, "--bank_decay must lie in [0, 1)"),
    ({"msr_fraction": 1.0}, "--msr_fraction must lie in [0, 1)"),
    ({"agc": False, "msr": False}, "--taa needs --agc"),
    ({"empty_batch": "step"}, "--empty_batch step is a rule of AGC without TAA"),
    ({"outer_learning_rate": 0.0}, "--outer_learning_rate must be above 0"),
    ({"outer_momentum": 1.0}, "--outer_momentum must lie in [0, 1)"),
    ({"outer_momentum": -0.1}, "--outer_momentum must lie in [0, 1)"),
    ({"agc": False, "taa": False}, "--msr needs --agc"),
    ({"num_shards": 1}, "--num_shards is 1"),
    ({"method": "none", "num_shards": 2}, "--method none is plain"),
    ({"method": "none", "agc": True}, "--method none is plain"),
    ({"method": "none", "msr": True}, "--method none is plain"),
    ({"method": "none", "taa": True}, "--method none is plain"),
    ({"num_train_epochs": 0}, "--num_train_epochs"),
    ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps"),
    ({"num_validation_images": 0}, "--num_validation_images"),
    ({"validation_inference_steps": 0}, "--validation_inference_steps"),
    ({"validation_prompts": ("a cat", "a \ud83d cat")}, "--validation_prompts holds half a char"),
    ({"validation_prompt": "a \udcff cat"}, "--validation_prompts holds half a character"),
    ({"ddp_timeout": 0}, "--ddp_timeout"),
    ({"learning_rate": 0.0}, "--learning_rate"),
    ({"learning_rate": float("nan")}, "--learning_rate"),
    ({"max_grad_norm": 0.0}, "--max_grad_norm"),
    ({"lr_warmup_steps": -1}, "--lr_warmup_steps"),
    ({"adam_weight_decay": -1.0}, "--adam_weight_decay"),
    ({"adam_beta1": 1.0}, "--adam_beta1"),
    ({"adam_beta2": -0.1}, "--adam_beta2"),
    ({"adam_epsilon": -1.0}, "--adam_epsilon"),
    ({"noise_offset": -1.0}, "--noise_offset"),
    ({"checkpointing_rounds": -1}, "--checkpointing_rounds"),
    ({"max_train_steps": 0}, "--max_train_steps"),
    ({"snr_gamma": 0.0}, "--snr_gamma"),
    ({"validation_prompts": ("a cat",), "validation_rounds": 0}, "--validation_rounds"),
    ({"validation_rounds": 1}, "--validation_rounds needs --validation_prompts"),
    ({"checkpoints_total_limit": 0}, "--checkpoints_total_limit"),
    ({"steps_per_round": 1, "max_train_steps": 1}, "give one of them"),
    ({"preset": "paper", "gradient_accumulation_steps": 2}, "--taa_leftovers drop"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES, ids=[str(given) for given, _ in MISTAKES])
def test_values_that_cannot_be(given, message):
    """Each rule, in one layer of its own over settings that are sound without it."""
    from_layers(NEEDED)
    with pytest.raises(UserError) as error:
        from_layers(NEEDED, given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"num_shards": 1, "msr": False},
        {"bank_decay": 0.0, "msr_fraction": 0.0, "taa_magnitude": 30.0, "bank_bins": 1000},
        {"preset": "paper", "method": "iet_agc", "gradient_accumulation_steps": 2},
        {"empty_batch": "step", "taa": False, "outer_learning_rate": 1.5, "outer_momentum": 0.0},
        {"checkpointing_rounds": 0, "lr_warmup_steps": 0, "agc_threshold": 0.0},
        {"validation_prompts": ("a cat",), "validation_rounds": 1},
    ],
    ids=str,
)
def test_values_at_the_edge_of_what_can_be(given):
    found = from_layers(NEEDED, given).as_dict()
    expected = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    assert expected.items() <= found.items()


def test_a_model_must_be_named():
    with pytest.raises(UserError, match="--pretrained_model_name_or_path"):
        from_layers({"train_data_dir": "pictures"})
