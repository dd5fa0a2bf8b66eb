import multiprocessing
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import CLIPTokenizer

from iet_sd.data.augmentation import Augmentation
from iet_sd.data.dataset import Loader, TrainingImages, collate
from iet_sd.data.shards import Visit, batches, visits
from iet_sd.data.sources import load_source
from iet_sd.errors import UserError
from iet_sd.models.tokens import Tokenize

R, L = 8, 6
STRONG = Augmentation(20.0, 3)


@pytest.fixture
def tokenizer():
    """Start, end (also padding), and the words a, b and c are the tokens 0 to 4."""
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "c</w>"]
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=L)


@pytest.fixture
def images(folder, config, tokenizer):
    """Training images a.png (one caption), b.png (three captions) and c.png (none)."""

    def make(**settings):
        rows = [
            {"file_name": "a.png", "text": "b a"},
            {"file_name": "b.png", "text": ["a", "b", "c"]},
        ]
        root = folder(["a.png", "b.png", "c.png"], rows)
        Image.new("RGB", (16, 30), "red").save(root / "c.png")
        settings = config(
            root, resolution=R, random_flip=True, on_missing_caption="empty", **settings
        )
        return TrainingImages(load_source(settings), Tokenize((tokenizer,)), settings)

    return make


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one
    )


def batches_for(dataset, size=4):
    return batches(0, 0, 0, range(len(dataset)), size, dataset.source.sizes)


def loaded(dataset, number, num_workers):
    loader = Loader(dataset, num_workers, pin_memory=False)
    return list(islice(loader.batches(batches_for(dataset)), number))


def test_example(images):
    example = images()[Visit(0, 5)]
    assert example["pixel_values"].shape == (3, R, R)
    assert example["pixel_values"].dtype == torch.float32
    assert example["pixel_values"].abs().max() <= 1
    assert example["input_ids"].tolist() == [0, 3, 2, 1, 1, 1]
    assert (example["index"], example["seed"]) == (0, 5)
    assert (example["original_size"], example["target_size"]) == ((16, 20), (R, R))
    assert example["crop_top_left"] in [(0, 0), (0, 1), (0, 2)]  # of 8 x 10


def test_long_caption_is_cut(images):
    tokens = images().read("a " * 20)
    assert tokens["input_ids"].tolist() == [0, 2, 2, 2, 2, 1]


def test_missing_caption_is_empty(images):
    assert images()[Visit(2, 0)]["input_ids"].tolist() == [0, 1, 1, 1, 1, 1]


def test_seed_settles_everything(images):
    dataset = images()
    for seed in range(5):
        assert equal(dataset[Visit(1, seed)], dataset[Visit(1, seed)])
    assert not equal(dataset[Visit(1, 0)], dataset[Visit(1, 1)])


def test_caption_is_drawn_from_the_list(images):
    dataset = images()
    drawn = [dataset[Visit(1, seed)]["input_ids"][1].item() for seed in range(90)]
    assert all(15 < drawn.count(token) < 45 for token in (2, 3, 4))


def test_augmentation_changes_pixels_alone(images):
    dataset = images()
    changed = 0
    for seed in range(10):
        plain, augmented = dataset[Visit(1, seed)], dataset.example(Visit(1, seed), STRONG)
        changed += not torch.equal(plain.pop("pixel_values"), augmented.pop("pixel_values"))
        assert equal(plain, augmented)
    assert changed > 5


def test_images_are_augmented_on_the_device_and_others_made_here(images):
    """Without a look at what came of it: this device has no values."""
    dataset, gently = images(), Augmentation(20.0, 3, "gentle")
    dataset.device = torch.device("meta")
    made = dataset.examples([(Visit(0, 1), gently), (Visit(0, 1), None)])
    assert [each["pixel_values"].device.type for each in made] == ["meta", "cpu"]
    assert made[0]["pixel_values"].shape == (3, R, R)


def test_threads_make_the_same_examples_at_the_same_time(images):
    """And name a bad image as one alone does."""
    dataset = images(shuffle_caption=True)
    looks = [
        (Visit(i % 3, seed), STRONG if seed % 2 else None) for seed in range(4) for i in (0, 1, 2)
    ]
    expected = [dataset.example(*look) for look in looks]
    together, make, meet = [], dataset.example, threading.Barrier(3)

    def example(*look):
        meet.wait(timeout=30)  # never passed by fewer than three
        together.append(threading.get_ident())
        return make(*look)

    dataset.example = example
    dataset.threads = 3
    made = dataset.examples(looks)
    assert all(equal(*pair) for pair in zip(made, expected, strict=True))
    assert len(set(together)) == 3
    dataset.example = make
    Path(dataset.config.train_data_dir, "b.png").unlink()
    with pytest.raises(UserError, match=r"b\.png"):
        dataset.examples(looks)


def test_collate(images):
    dataset = images()
    big = 2**63 - 1
    batch = collate([dataset[Visit(1, big)], dataset[Visit(0, 1)]])
    assert batch["pixel_values"].shape == (2, 3, R, R)
    assert batch["pixel_values"].is_contiguous()
    assert batch["input_ids"].shape == (2, L)
    assert batch["index"].tolist() == [1, 0]
    assert batch["seed"].tolist() == [big, 1]
    assert batch["original_size"].tolist() == [[16, 20], [16, 20]]
    assert batch["target_size"].tolist() == [[R, R], [R, R]]
    assert batch["crop_top_left"].shape == (2, 2)
    assert all(t.dtype == torch.int64 for name, t in batch.items() if name != "pixel_values")


def test_loader_follows_the_visits(images):
    dataset = images()
    source = list(islice(visits(0, 0, 0, range(3)), 12))
    for number, batch in enumerate(loaded(dataset, 3, num_workers=0)):
        chunk = source[4 * number : 4 * number + 4]
        assert equal(batch, collate([dataset[visit] for visit in chunk]))


def test_loader_leaves_torchs_generator_alone(images):
    before = torch.get_rng_state()
    loaded(images(), 1, num_workers=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def start_method(request):
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(usual, force=True)


def test_workers_give_the_same_batches_and_end(images, start_method):
    """Whatever they are started by, and with all that is drawn by chance: bit for bit."""
    dataset = images(
        aspect_ratio_buckets="8,8;8,16;16,8",
        proportion_empty_prompts=0.3,
        shuffle_caption=True,
        caption_prefix="c",
    )
    assert len(set(dataset.source.sizes)) == 2
    expected = loaded(dataset, 6, num_workers=0)
    assert len({batch["pixel_values"].shape for batch in expected}) > 1
    number = 2 if start_method == "fork" else 1  # the others import all anew
    loader = Loader(dataset, number, pin_memory=False)
    loading = loader.batches(batches_for(dataset))
    assert all(equal(*pair) for pair in zip(islice(loading, 6), expected, strict=True))
    workers = multiprocessing.active_children()
    assert len(workers) == number
    loading.close()
    loader.close()
    assert ended(workers)


def ended(workers):
    for worker in workers:
        worker.join(timeout=10)
    return not any(worker.is_alive() for worker in workers)


def test_workers_outlive_a_stream_and_drop_what_they_read_ahead(images):
    """Of each stream a few batches, while the workers have read on; an image among them is bad."""
    dataset = images(check_images="none")
    Path(dataset.source.dataset[1]["image"]["path"]).write_text("words")
    loader, workers = Loader(dataset, 2, pin_memory=False), []
    for number in (1, 3, 2):
        good = [[Visit(0, 10 * number + i)] for i in range(number)]
        stream = loader.batches(iter([*good, *[[Visit(1, 0)]] * 9]))
        expected = [collate([dataset[visit] for visit in visits]) for visits in good]
        assert all(equal(*pair) for pair in zip(islice(stream, number), expected, strict=True))
        stream.close()
        workers.append({worker.pid for worker in multiprocessing.active_children()})
    assert len(workers[0]) == 2
    assert workers[0] == workers[1] == workers[2]
    with pytest.raises(UserError, match="not an image"):
        next(loader.batches(iter([[Visit(1, 0)]])))
    left = multiprocessing.active_children()
    del loader, stream
    assert ended(left)


def test_sizes_of_a_batch(images):
    dataset = images(aspect_ratio_buckets="8,8;8,16;16,8")
    for batch in loaded(dataset, 6, num_workers=0):
        (size,) = {dataset.source.sizes[i] for i in batch["index"].tolist()}
        assert batch["pixel_values"].shape[1:] == (3, *size)
        assert batch["target_size"].tolist() == [list(size)] * len(batch["index"])
        for index, original in zip(batch["index"].tolist(), batch["original_size"], strict=True):
            assert original.tolist() == ([16, 20] if index < 2 else [30, 16])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_image_met_in_training_is_named(images, num_workers):
    dataset = images(check_images="none")
    Path(dataset.source.dataset[1]["image"]["path"]).write_text("words")
    with pytest.raises(UserError) as error:
        loaded(dataset, 2, num_workers)
    assert str(error.value) == "b.png: not an image, or of an unknown format"


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (Path.unlink, "no such file"),
        (lambda path: Image.new("RGB", (20, 16)).save(path), "not the file that it was before"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not the file that it was before"),
    ],
    ids=["gone", "another", "cut"],
)
def test_an_image_that_goes_or_changes_in_training_is_named(harm, reason, images, num_workers):
    dataset = images()
    loaded(dataset, 2, num_workers)
    harm(Path(dataset.source.dataset[1]["image"]["path"]))
    with pytest.raises(UserError, match=rf"^b\.png: {reason}\. .*Put it back as it was") as error:
        loaded(dataset, 2, num_workers)
    assert "\n" not in str(error.value)


def test_images_in_rows_cannot_change_and_are_not_compared(images, config, tokenizer, tmp_path):
    """A row is read once at the start; hashing it at every visit would find nothing."""
    files = [Path(row["image"]["path"]) for row in images().source.dataset]
    rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in files]}
    Dataset.from_dict(rows | {"text": ["a"] * 3}).to_parquet(tmp_path / "data.parquet")
    settings = config(tmp_path / "data.parquet", resolution=R)
    source = load_source(settings)
    assert all(source.digests)
    other = replace(source, digests=("another",) * 3)
    assert equal(
        TrainingImages(source, Tokenize((tokenizer,)), settings)[Visit(1, 0)],
        TrainingImages(other, Tokenize((tokenizer,)), settings)[Visit(1, 0)],
    )
