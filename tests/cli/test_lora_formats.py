"""From the command line to every file of a LoRA, in bf16, and what becomes of them."""

import yaml
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from iet_sd.cli.train import train
from iet_sd.models.saving import KOHYA_LORA, LORA, MERGED
from tests.cli.test_output_dir import names


def test_a_run_writes_all_that_was_asked_for_and_the_next_replaces_it(argv, pipelines, tmp_path):
    output = tmp_path / "output"
    short = argv(num_rounds=1, steps_per_round=1, checkpointing_rounds=0, mixed_precision="bf16")
    lora = ["--train_mode", "lora", "--train_text_encoder", "--text_encoder_lr", "1e-5"]
    assert train([*short, *lora, "--save_kohya_lora", "--merge_lora"]) == 0
    found = {path.name for path in output.iterdir() if path.name != "logs"}
    files = {LORA, KOHYA_LORA, MERGED, "README.md", "metrics.jsonl", "training_config.yaml"}
    assert found == files
    assert sum("lora_te_text_model" in name for name in load_file(output / KOHYA_LORA)) == 24
    StableDiffusionPipeline.from_pretrained(output / MERGED)
    settings = yaml.safe_load((output / "training_config.yaml").read_text())
    assert settings["text_encoder_lr"] == 1e-5
    assert train([*short, "--train_text_encoder", "--overwrite_output_dir"]) == 0
    left = {name.partition("/")[0] for name in names(output)}
    assert not left & {LORA, KOHYA_LORA, MERGED}
    trained, source = (
        load_file(folder / "text_encoder" / "model.safetensors")
        for folder in (output, pipelines["sd1"])
    )
    assert all((trained[name] != tensor).any() for name, tensor in source.items())
