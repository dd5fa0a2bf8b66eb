"""Commands that diffusers documents for its text-to-image scripts run with our script's name.

Flags and defaults are facts of examples/text_to_image at diffusers 58eb52c0.
"""

import json
import re
import shlex

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode

from iet_sd.arguments import build_parser, load
from iet_sd.cli.train import train
from iet_sd.config import Config
from iet_sd.errors import UserError
from tests.diffusers_flags import FULL, LORA

# Where ours differ, and by what text of --help.
OURS = {
    "tracker_project_name": "iet-sd-fine-tune",
}
CHOICES = {
    "lr_scheduler": (
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
    ),
    "mixed_precision": ("no", "fp16", "bf16"),
    "image_interpolation_mode": tuple(mode.lower() for mode in InterpolationMode.__members__),
    "prediction_type": ("epsilon", "v_prediction"),
    "report_to": ("tensorboard", "wandb", "comet_ml", "all"),
}
MODEL = 'export MODEL_NAME="CompVis/stable-diffusion-v1-4"\n'
NARUTO = 'export DATASET_NAME="lambdalabs/naruto-blip-captions"\n'
RECIPE = """--use_ema \\
  --resolution=512 --center_crop --random_flip \\
  --train_batch_size=1 \\
  --gradient_accumulation_steps=4 \\
  --gradient_checkpointing \\
  --max_train_steps=15000 \\
  --learning_rate=1e-05 \\
  --max_grad_norm=1 \\
  --lr_scheduler="constant" --lr_warmup_steps=0 \\
  --output_dir="sd-naruto-model"
"""
HUB_DATA = "  --pretrained_model_name_or_path=$MODEL_NAME \\\n  --dataset_name=$DATASET_NAME \\\n  "
OWN_DATA = "  --pretrained_model_name_or_path=$MODEL_NAME \\\n  --train_data_dir=$TRAIN_DIR \\\n  "
FP16 = 'accelerate launch --mixed_precision="fp16" '
SD = {
    "full": f"{MODEL}{NARUTO}\n{FP16} train_text_to_image.py \\\n{HUB_DATA}{RECIPE}",
    "own data": (
        f'{MODEL}export TRAIN_DIR="path_to_your_dataset"\n\n{FP16}train_text_to_image.py \\\n'
        f"{OWN_DATA}{RECIPE}"
    ),
    "several GPUs": (
        f"{MODEL}{NARUTO}\n{FP16}--multi_gpu  train_text_to_image.py \\\n{HUB_DATA}{RECIPE}"
    ),
    "LoRA": f"""{MODEL}{NARUTO}
{FP16}train_text_to_image_lora.py \\
  --pretrained_model_name_or_path=$MODEL_NAME \\
  --dataset_name=$DATASET_NAME --caption_column="text" \\
  --resolution=512 --random_flip \\
  --train_batch_size=1 \\
  --num_train_epochs=100 --checkpointing_steps=5000 \\
  --learning_rate=1e-04 --lr_scheduler="constant" --lr_warmup_steps=0 \\
  --seed=42 \\
  --output_dir="sd-naruto-model-lora" \\
  --validation_prompt="cute dragon creature" --report_to="wandb"
""",
}
XL = 'export MODEL_NAME="stabilityai/stable-diffusion-xl-base-1.0"\n'
VAE = 'export VAE_NAME="madebyollin/sdxl-vae-fp16-fix"\n'
XL_LORA = """--resolution=1024 --random_flip \\
  --train_batch_size=1 \\
  --num_train_epochs=2 --checkpointing_steps=500 \\
  --learning_rate=1e-04 --lr_scheduler="constant" --lr_warmup_steps=0 \\
"""
SDXL = {
    "SDXL, full": f"""{XL}{VAE}{NARUTO}
accelerate launch train_text_to_image_sdxl.py \\
  --pretrained_model_name_or_path=$MODEL_NAME \\
  --pretrained_vae_model_name_or_path=$VAE_NAME \\
  --dataset_name=$DATASET_NAME \\
  --enable_xformers_memory_efficient_attention \\
  --resolution=512 --center_crop --random_flip \\
  --proportion_empty_prompts=0.2 \\
  --train_batch_size=1 \\
  --gradient_accumulation_steps=4 --gradient_checkpointing \\
  --max_train_steps=10000 \\
  --use_8bit_adam \\
  --learning_rate=1e-06 --lr_scheduler="constant" --lr_warmup_steps=0 \\
  --mixed_precision="fp16" \\
  --report_to="wandb" \\
  --validation_prompt="a cute Sundar Pichai creature" --validation_epochs 5 \\
  --checkpointing_steps=5000 \\
  --output_dir="sdxl-naruto-model" \\
  --push_to_hub
""",
    "SDXL, LoRA": f"""{XL}{VAE}{NARUTO}
accelerate launch train_text_to_image_lora_sdxl.py \\
  --pretrained_model_name_or_path=$MODEL_NAME \\
  --pretrained_vae_model_name_or_path=$VAE_NAME \\
  --dataset_name=$DATASET_NAME --caption_column="text" \\
  {XL_LORA}  --mixed_precision="fp16" \\
  --seed=42 \\
  --output_dir="sd-naruto-model-lora-sdxl" \\
  --validation_prompt="cute dragon creature" --report_to="wandb" \\
  --push_to_hub
""",
    "SDXL, LoRA, text encoders": f"""{XL}{NARUTO}
accelerate launch train_text_to_image_lora_sdxl.py \\
  --pretrained_model_name_or_path=$MODEL_NAME \\
  --dataset_name=$DATASET_NAME --caption_column="text" \\
  {XL_LORA}  --seed=42 \\
  --output_dir="sd-naruto-model-lora-sdxl-txt" \\
  --train_text_encoder \\
  --validation_prompt="cute dragon creature" --report_to="wandb" \\
  --push_to_hub
""",
}


def script_and_flags(text):
    """What a shell makes of a documented command: the launcher's settings, and our flags.

    A LoRA is a script of its own there and ``--train_mode lora`` here.
    """
    exported = dict(re.findall(r'^export (\w+)="(.*)"$', text, re.M))
    line = re.sub(r"^export .*\n", "", text, flags=re.M).replace("\\\n", " ")
    words = shlex.split(re.sub(r"\$(\w+)", lambda found: exported[found[1]], line))
    assert words[:2] == ["accelerate", "launch"]
    launch = launch_command_parser().parse_args(words[2:])
    lora = ["--train_mode", "lora"] if "_lora" in launch.training_script else []
    return launch, [*launch.training_script_args, *lora]


def defaults():
    return {
        name: field.default
        for cls in Config.sections().values()
        for name, field in cls.__dataclass_fields__.items()
    }


@pytest.mark.parametrize("name", FULL | LORA)
def test_every_flag_of_the_scripts_is_ours_with_its_default(name):
    actions = {flag: a for a in build_parser()._actions for flag in a.option_strings}
    action, default = actions[f"--{name}"], defaults()[name]
    if name in OURS:
        assert default == OURS[name]
    elif name == "pretrained_model_name_or_path":
        assert "(required)" in action.help
    else:
        assert default == (FULL | LORA if name not in FULL else FULL)[name]
    if type(FULL.get(name)) is bool:
        assert action.nargs == 0  # a bare flag sets it
    assert set(CHOICES.get(name, ())) <= set(action.choices or ())


def test_there_are_as_many_flags_as_in_the_scripts():
    gone = {name for name in FULL if name.startswith(("dream_", "input_")) or "ema" in name}
    gone |= {"tracker_project_name", "validation_prompts"}
    assert len(FULL) == 57
    assert len((FULL.keys() - gone) | LORA.keys()) == 51


@pytest.mark.parametrize("text", [*SD.values(), *SDXL.values()], ids=[*SD, *SDXL])
def test_a_documented_command_is_understood(text):
    launch, argv = script_and_flags(text)
    config = load(argv)
    values = config.as_dict()
    assert values["pretrained_model_name_or_path"] in text
    assert values["learning_rate"] == float(re.search(r"learning_rate=(\S+)", text)[1])
    assert values["train_mode"] == ("lora" if "lora" in launch.training_script else "full")
    prompt = re.search(r'--validation_prompt="(.*?)"', text)
    assert values["validation_prompts"] == ([prompt[1]] if prompt else None)
    for flag in re.findall(r"--(use_ema|use_8bit_adam|gradient_checkpointing|push_to_hub)\b", text):
        assert values[flag] is True


@pytest.mark.parametrize("name", ["full", "own data", "LoRA"])
def test_a_documented_command_trains(name, pipelines, images, argv, tmp_path):
    """With the tiny model and data, few steps, and what this machine has no GPU or account for."""
    launch, given = script_and_flags(SD[name])
    assert launch.mixed_precision == "fp16"
    output = tmp_path / "output"
    small = {
        "pretrained_model_name_or_path": pipelines["sd1"],
        "cache_dir": tmp_path / "cache",
        "resolution": 32,
        "max_train_steps": 8,  # two a proxy: after one, an average is the weights themselves
        "num_rounds": 1,
        "output_dir": output,
        "report_to": "tensorboard",
        "num_validation_images": 1,
        "validation_inference_steps": 2,
    }
    place = "train_data_dir" if name == "own data" else "dataset_name"
    assert any(word.startswith(f"--{place}=") for word in given)
    small[place] = images
    assert train([*given, *(str(w) for k, v in small.items() for w in (f"--{k}", v))]) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["updates"] for line in lines if line["kind"] == "round") == 8
    pipeline = StableDiffusionPipeline.from_pretrained(
        pipelines["sd1"] if name == "LoRA" else output
    )
    if name == "LoRA":
        pipeline.load_lora_weights(str(output))
        assert (output / "sample_grid.png").is_file()
    else:
        raw = load_file(output / "unet_non_ema" / "diffusion_pytorch_model.safetensors")
        ours = dict(pipeline.unet.named_parameters())
        assert any(not torch.equal(ours[key], raw[key]) for key in raw)


def written(folder):
    return sorted(p.name for p in folder.glob("validation-*.png"))


def test_validation_epochs_are_passes_of_all_proxies_together(argv, tmp_path):
    """16 samples, 2 shards, 4 rounds of 2 batches of 4 each: a round is one pass."""
    given = {"num_rounds": 4, "agc_threshold": 0.0, "validation_prompt": "a cat"}
    given |= {"num_validation_images": 1, "validation_inference_steps": 1}
    for epochs, rounds in (("2", (2, 4)), ("0", ())):
        folder = tmp_path / epochs
        assert train(argv(**given, validation_epochs=epochs, output_dir=folder)) == 0
        assert written(folder) == [f"validation-{round}.png" for round in rounds]
        assert (folder / "sample_grid.png").is_file()


def test_rounds_that_are_named_replace_epochs_and_half_a_pass_is_none(argv, tmp_path):
    given = {"num_rounds": 4, "agc_threshold": 0.0, "validation_prompt": "a cat"}
    given |= {"num_validation_images": 1, "validation_inference_steps": 1}
    one = {**given, "validation_epochs": 1}
    assert train(argv(**one, validation_rounds=3)) == 0
    assert written(tmp_path / "output") == ["validation-3.png"]
    half = {**one, "steps_per_round": 1, "output_dir": tmp_path / "half"}
    assert train(argv(**half)) == 0
    assert written(tmp_path / "half") == ["validation-2.png", "validation-4.png"]


def test_one_prompt_is_a_list_of_one():
    model = ["--pretrained_model_name_or_path", "name/model", "--train_data_dir", "data"]
    config = load([*model, "--validation_prompt", "a cat", "--validation_rounds", "1"])
    assert config.training.validation_prompts == ("a cat",)
    assert config.as_dict()["validation_prompt"] is None
    with pytest.raises(UserError, match=r"--validation_prompt and --validation_prompts"):
        load([*model, "--validation_prompt", "a cat", "--validation_prompts", "a dog"])


def test_a_prompt_on_the_command_line_replaces_those_of_the_file(tmp_path):
    model = ["--pretrained_model_name_or_path", "name/model", "--train_data_dir", "data"]
    (tmp_path / "c.yaml").write_text("validation_prompts: [a dog, a cow]\n")
    file = ["--config", str(tmp_path / "c.yaml")]
    config = load([*model, *file, "--validation_prompt", "a cat"])
    assert config.training.validation_prompts == ("a cat",)


@pytest.fixture
def tf32():
    """The switch of TF32, off before and after."""
    switch = torch.backends.cuda.matmul
    switch.allow_tf32 = False
    yield switch
    switch.allow_tf32 = False


def test_flags_of_the_machine_do_their_work(argv, tf32, tmp_path):
    """TF32, the tracker's folder and project, and a launcher's rank that changes nothing."""
    given = {"report_to": "tensorboard", "logging_dir": "curves", "tracker_project_name": "mine"}
    assert train(argv(**given, allow_tf32="", local_rank=0)) == 0
    assert tf32.allow_tf32
    assert list((tmp_path / "output" / "curves" / "mine").rglob("*tfevents*"))
    other = {"output_dir": tmp_path / "other", "local_rank": 3, "allow_tf32": ""}
    assert train(argv(**other, resume_from_checkpoint=tmp_path / "output" / "checkpoint-2")) == 0
