"""``--eval_every_rounds`` and ``--keep_best`` through the command line."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from iet_sd import reporting
from iet_sd.cli.train import train
from iet_sd.engine import checkpoint
from iet_sd.engine.rounds import Trainer
from iet_sd.evaluation.probe import Probe
from iet_sd.hub.contents import contents
from iet_sd.probing import Prober
from tests.cli.test_output_dir import names
from tests.compare import equal
from tests.engine.running import timeless
from tests.launching import finish

PROBE = {
    "eval_every_rounds": 1,
    "eval_prompts": 4,
    "eval_inference_steps": 2,
    "eval_samples": 8,
    "eval_timesteps": 2,
    "keep_best": "",
}
# So fast that later rounds are worse.
RUN = {"num_rounds": 4, "aggregate_every": 1, "learning_rate": 1e-1, "lr_warmup_steps": 0}


def unet(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def lines(folder, kind):
    return [line for line in timeless(folder / "metrics.jsonl") if line["kind"] == kind]


@pytest.fixture
def probed(argv, heldout):
    """Flags of a short run that measures."""

    def make(**given):
        return argv(heldout_data_dir=heldout, **RUN | PROBE | given)

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where a run that is never stopped goes: the first test to ask makes it."""
    return tmp_path_factory.mktemp("whole") / "output"


@pytest.fixture
def never_stopped(whole, probed):
    """The result of that run, which has a tracker too."""
    if not whole.exists():
        assert train(probed(output_dir=whole, report_to="tensorboard")) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
    return whole


class Killed(BaseException):
    """As SIGKILL: nothing runs after it."""


def killed(argv, monkeypatch, owner, name, call):
    """A run that ends at the ``call``-th call of a method, before it does anything."""
    method, calls = getattr(owner, name), []

    def counting(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return method(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, counting)
        with pytest.raises(Killed):
            train(argv)


def test_training_images_held_out_are_refused_before_an_earlier_run_goes(
    probed, heldout, tmp_path, capsys
):
    earlier = tmp_path / "output" / "metrics.jsonl"
    earlier.parent.mkdir()
    earlier.write_text("")
    assert train(probed(train_data_dir=heldout, overwrite_output_dir="")) == 2
    assert "30 of 30 held-out images are training images too" in capsys.readouterr().err
    assert earlier.exists()


def test_an_embedder_that_does_not_load_is_found_before_an_earlier_run_goes(
    probed, tmp_path, capsys
):
    """What is checked before weights are loaded is the file's form alone."""
    earlier, weights = tmp_path / "output" / "metrics.jsonl", tmp_path / "inception.pth"
    earlier.parent.mkdir()
    earlier.write_text("")
    torch.save({"no": torch.zeros(1)}, weights)
    flags = {"eval_embedder": f"inception={weights}", "overwrite_output_dir": ""}
    assert train(probed(**flags)) == 2
    assert "does not hold the weights of torch-fidelity" in capsys.readouterr().err
    assert earlier.exists()


def test_readings_best_and_picture(never_stopped):
    output = never_stopped
    readings, (advice,) = lines(output, "probe"), lines(output, "recommendation")
    assert [line["round"] for line in readings] == [0, 1, 2, 3, 4]
    everything = timeless(output / "metrics.jsonl")
    assert everything[-1] == advice
    order = [line["round"] for line in everything[:-1]]
    assert order == sorted(order)
    assert f"Keep round {advice['round']}: " in advice["text"]
    assert advice["round"] < 4, "a run in which the last is not the best is what this test needs"

    # The weights of the checkpoint of that round, in the pipeline beside the last one's.
    kept = unet(output / "best")
    saved = load_file(output / f"checkpoint-{advice['round']}" / "weights.safetensors")
    assert equal(kept, {name.removeprefix("unet."): t for name, t in saved.items()})
    assert not equal(kept, unet(output))
    numbers = json.loads((output / "best" / "probe.json").read_text())
    assert readings[advice["round"]] == {k: v for k, v in numbers.items() if k != "seconds"}
    # The data are known to `evaluate` as they are beside the last round's weights.
    settings = "training_config.yaml"
    assert (output / "best" / settings).read_text() == (output / settings).read_text()
    assert not (output / "probe").exists()
    assert Image.open(output / "frontier.png").size == (960, 640)
    card = (output / "README.md").read_text()
    assert advice["text"] in card
    assert "](frontier.png)" in card
    # Each card says which round's weights are beside it, and is pushed with them.
    assert "| weights | after round 4 |" in card
    card = (output / "best" / "README.md").read_text()
    assert f"| weights | after round {advice['round']} |" in card
    assert "](frontier.png)" in card
    pushed = {"README.md", "frontier.png", "metrics.jsonl", "model_index.json", settings}
    assert pushed < set(contents(output / "best", "me/cats-best"))

    events = EventAccumulator(str(output / "logs" / "iet-sd-fine-tune")).Reload()
    steps = [2 * 2 * number for number in range(5)]
    for name in ("excess_score", "heldout_loss", "membership_auc"):
        curve = events.Scalars(f"eval/{name}")
        assert [event.step for event in curve] == steps
        values = [line[name] for line in readings]
        assert [event.value for event in curve] == pytest.approx(values, rel=1e-6)
    assert events.Images("frontier")


def test_a_run_without_it_trains_the_same(never_stopped, argv, tmp_path):
    plain = tmp_path / "output"
    assert train(argv(**RUN)) == 0
    assert equal(unet(plain), unet(never_stopped))
    measured = ("probe", "recommendation")
    everything = timeless(never_stopped / "metrics.jsonl")
    rest = [line for line in everything if line["kind"] not in measured]
    assert timeless(plain / "metrics.jsonl") == rest
    added = {p.name for p in never_stopped.iterdir()} - {p.name for p in plain.iterdir()}
    assert added == {"best", "frontier.png", "logs"}


KILLS = {
    "in the reading of round 2": (Probe, "read", 3),
    "before the checkpoint of round 3": (checkpoint, "save", 4),
    "at the end": (Prober, "save_best", 1),
    "after the weights of the round to keep": (reporting, "write_settings", 1),
}


@pytest.mark.parametrize(("owner", "name", "call"), KILLS.values(), ids=KILLS)
def test_killed_and_gone_on_is_never_stopped(
    owner, name, call, never_stopped, probed, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "output"
    few = {"checkpoints_total_limit": 1}
    killed(probed(**few), monkeypatch, owner, name, call)
    again = probed(resume_from_checkpoint="latest", **few)
    # The second time all is done already: nothing is lost.
    for _ in range(2 if owner in (Prober, reporting) else 1):
        assert train(again) == 0
        assert timeless(output / "metrics.jsonl") == timeless(never_stopped / "metrics.jsonl")
        assert equal(unet(output / "best"), unet(never_stopped / "best"))
        assert equal(unet(output), unet(never_stopped))
        assert names(output / "best") == names(never_stopped / "best")
        assert not (output / "probe").exists()
        (advice,) = lines(output, "recommendation")
        assert advice["text"] in capsys.readouterr().out


def test_it_goes_on_elsewhere_from_a_checkpoint_of_a_run_that_was_killed(
    never_stopped, probed, tmp_path, monkeypatch
):
    whole, broken, other = never_stopped, tmp_path / "broken", tmp_path / "other"
    killed(probed(output_dir=broken), monkeypatch, Probe, "read", 4)
    given = {"output_dir": other, "resume_from_checkpoint": broken / "checkpoint-2"}
    assert train(probed(**given)) == 0
    assert timeless(other / "metrics.jsonl") == timeless(whole / "metrics.jsonl")
    assert equal(unet(other / "best"), unet(whole / "best"))


def test_other_settings_of_the_probe_go_on_with_readings_of_their_own(
    never_stopped, probed, tmp_path, monkeypatch, caplog
):
    """Of the start too, which is not live any more; training does not depend on them."""
    output = tmp_path / "output"
    killed(probed(eval_prompts=5), monkeypatch, Probe, "read", 4)
    assert train(probed(resume_from_checkpoint="latest")) == 0
    assert "3 readings are left out" in caplog.text
    expected = [line for line in lines(never_stopped, "probe") if line["round"] != 1]
    assert lines(output, "probe") == expected
    assert equal(unet(output), unet(never_stopped))


def test_a_round_that_was_kept_stays_where_readings_of_other_settings_have_it_no_more(
    never_stopped, probed, tmp_path, caplog
):
    """Of a run that is through only the start and the end can be measured again."""
    output = tmp_path / "output"
    shutil.copytree(never_stopped, output)
    assert train(probed(eval_prompts=5, resume_from_checkpoint="latest")) == 0
    assert [line["round"] for line in lines(output, "probe")] == [0, 4]
    (advice,) = lines(never_stopped, "recommendation")
    assert f"best stays as it is: it has round {advice['round']}, of which" in caplog.text
    assert names(output / "best") == names(never_stopped / "best")
    for name in names(output / "best"):
        assert (output / "best" / name).read_bytes() == (never_stopped / "best" / name).read_bytes()
    assert not (output / "probe").exists()


def test_rounds_that_give_no_new_model_are_not_measured(probed, tmp_path):
    given = {"aggregate_every": 2, "num_rounds": 5, "keep_best": None, "eval_every_rounds": 3}
    assert train(probed(**given)) == 0
    assert [line["round"] for line in lines(tmp_path / "output", "probe")] == [0, 4, 5]


def test_a_lora_and_its_moving_average(probed, tmp_path):
    """What is measured and kept is what the run would save: the average."""
    given = {"train_mode": "lora", "use_ema": "", "num_rounds": 2}
    assert train(probed(**given)) == 0
    output = tmp_path / "output"
    (advice,) = lines(output, "recommendation")
    name = "pytorch_lora_weights.safetensors"
    kept = load_file(output / "best" / name)
    saved = load_file(output / f"checkpoint-{advice['round']}" / "ema.safetensors")
    assert sorted(t.sum().item() for t in kept.values()) == sorted(
        t.sum().item() for t in saved.values()
    )
    assert (advice["round"] == 2) == equal(kept, load_file(output / name))


def test_what_drawing_needs_beside_training_is_freed_again(probed, monkeypatch):
    """Else networks that caches have freed are there from the first reading or picture on."""
    there, run_round = [], Trainer.run_round

    def seen(trainer, state):
        there.append(set(trainer.objective.components._loaded))
        yield from run_round(trainer, state)

    monkeypatch.setattr(Trainer, "run_round", seen)
    drawing = ["--validation_prompts", "a cat", "--validation_inference_steps", "1"]
    flags = probed(num_rounds=2, method="iet_agc", cache="on", center_crop="", validation_rounds=1)
    assert train([*flags, *drawing]) == 0
    assert there == [set(), set()]


def test_a_round_that_cannot_be_measured_is_left_out(probed, tmp_path, monkeypatch, caplog):
    """Training goes on: the images of one round are not finite, another has no memory for it."""
    read = Probe.read

    def broken(self, round, pipeline, autocast):
        bias = pipeline.vae.decoder.conv_out.bias
        before = bias.clone()
        if round == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if round == 2:
            bias.fill_(float("nan"))
        try:
            return read(self, round, pipeline, autocast)
        finally:
            bias.copy_(before)

    monkeypatch.setattr(Probe, "read", broken)
    assert train(probed(num_rounds=3)) == 0
    assert "Round 2 could not be measured: images drawn by the model are not" in caplog.text
    assert "Round 1 could not be measured: CUDA out of memory" in caplog.text
    assert [line["round"] for line in lines(tmp_path / "output", "probe")] == [0, 3]


@pytest.mark.slow
def test_two_processes(never_stopped, probed, tmp_path):
    """The main process measures, the other waits."""
    one, two = never_stopped, tmp_path / "two"
    finish(probed(output_dir=two), processes=2)
    for a, b in zip(lines(one, "probe"), lines(two, "probe"), strict=True):
        assert a["round"] == b["round"]
        assert a["heldout_loss"] == pytest.approx(b["heldout_loss"], rel=1e-3)
    assert (two / "best" / "probe.json").is_file()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"heldout_data_dir": None}, "--eval_every_rounds compares with images that are not"),
        ({"heldout_data_dir": "nowhere"}, "nowhere"),
        ({"eval_every_rounds": None}, "--keep_best needs --eval_every_rounds"),
        ({"eval_prompts": 1}, "--eval_prompts must be at least 2"),
        ({"eval_embedder": "sscd"}, "'sscd' is no embedder"),
        ({"max_train_samples": 1}, "at least 2 training images; got 1"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_before_weights_are_loaded(
    given, said, argv, heldout, tmp_path, monkeypatch, capsys
):
    from iet_sd.models import loading

    monkeypatch.setattr(loading, "load_components", None)
    flags = {"heldout_data_dir": heldout, **PROBE, **given}
    assert train(argv(**flags)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert said in error[0]
    assert not (tmp_path / "output").exists()


def test_another_run_replaces_it_all(probed, argv, tmp_path):
    output = tmp_path / "output"
    assert train(probed(num_rounds=2)) == 0
    shutil.copytree(output / "best", output / "probe")  # as if killed
    assert train([*argv(num_rounds=2), "--overwrite_output_dir"]) == 0
    left = {path.name for path in output.iterdir()}
    assert not left & {"best", "probe", "frontier.png"}
