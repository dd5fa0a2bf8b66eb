import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitImageProcessor

from iet_sd.errors import UserError
from iet_sd.evaluation import networks
from iet_sd.evaluation.downloads import PUBLISHED, Published
from iet_sd.evaluation.embedders import build_embedder, check_embedder
from tests.networks import (
    save_script,
    tiny_clip,
    tiny_convolution,
    tiny_dinov2,
)


def picture(seed, size=(48, 48)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


PICTURES = [picture(0), picture(1), picture(2)]
# In an order in which equal sizes are not neighbours.
MIXED = [picture(0), picture(1, (64, 40)), picture(2), picture(3, (40, 64)), picture(4, (64, 40))]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return save_script(tiny_convolution(), tmp_path_factory.mktemp("torchscript") / "tiny.pt")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return tiny_dinov2(tmp_path_factory.mktemp("models"))


@pytest.fixture
def copy(tmp_path):
    """Copies a folder to where a test may change it."""
    return lambda folder: shutil.copytree(folder, tmp_path / "copy")


def test_pixels_is_zero_mean_normalised_cross_correlation():
    """Of images of 64 x 64 averaged over blocks of 2 x 2, by the formula."""
    images = [picture(0, (64, 64)), picture(1, (64, 64)), Image.new("RGB", (64, 64), (9, 90, 200))]
    blocks = [
        (np.asarray(image, dtype=np.float64)).reshape(32, 2, 32, 2, 3).mean((1, 3)).ravel()
        for image in images
    ]
    features = build_embedder("pixels")(images).astype(np.float64)
    assert features.shape == (3, 3072)
    for a in range(3):
        for b in range(3):
            covariance = np.mean((blocks[a] - blocks[a].mean()) * (blocks[b] - blocks[b].mean()))
            expected = covariance / (blocks[a].std() * blocks[b].std())
            found = features[a] @ features[b]
            found /= np.linalg.norm(features[a]) * np.linalg.norm(features[b])
            assert found == pytest.approx(expected, abs=1e-5)


def test_pixels_ignores_brightness_and_contrast():
    pixels = np.random.default_rng(0).integers(100, 150, (32, 32, 3)).astype(np.uint8)
    images = [Image.fromarray(pixels), Image.fromarray(2 * pixels - 90)]
    a, b = build_embedder("pixels")(images)
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) == pytest.approx(1, abs=1e-5)


def test_raw_pixels_are_all_pixels():
    found = build_embedder("raw_pixels")(PICTURES)
    expected = [np.asarray(image).transpose(2, 0, 1).ravel() / 255 for image in PICTURES]
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert found.dtype == np.float32


def test_raw_pixels_of_unequal_sizes():
    with pytest.raises(UserError, match="needs images of one size"):
        build_embedder("raw_pixels")([picture(0), picture(0, (10, 10))])


def test_images_of_mixed_sizes_keep_their_order(file):
    embedder = build_embedder(f"torchscript={file}")
    alone = np.concatenate([embedder([image]) for image in MIXED])
    np.testing.assert_allclose(embedder(MIXED), alone, atol=1e-6)
    assert len({tuple(row) for row in alone}) == len(MIXED)


def test_sscd_from_the_cache(file, tmp_path, monkeypatch):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    published = Published("https://localhost/sscd.pt", digest)
    monkeypatch.setitem(PUBLISHED, "sscd_disc_mixup", published)
    shutil.copy(file, tmp_path / "sscd.pt")
    embedder = build_embedder("sscd_disc_mixup", cache_dir=tmp_path)
    assert embedder.name == "sscd_disc_mixup"
    # A file given by its path has the plain name only if it is the published one.
    assert build_embedder(f"sscd_disc_mixup={file}").name == "sscd_disc_mixup"
    assert build_embedder(f"sscd_disc_mixup={file}").fingerprint == embedder.fingerprint


class Wrong(nn.Module):
    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.what == "map" else x.mean((1, 2, 3)) if self.what == "row" else x[0, 0]


@pytest.mark.parametrize("what", ["map", "row", "first"])
def test_network_without_features(tmp_path, what):
    embedder = build_embedder(f"torchscript={save_script(Wrong(what), tmp_path / 'wrong.pt')}")
    with pytest.raises(UserError, match=r"wrong\.pt must give features of the shape \(3, D\)"):
        embedder(PICTURES)


class Attack:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes a module of the user's onto the path of Python; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text):
        name = f"user_module_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text("import numpy as np\n" + text)
        return name

    return write


def test_python_function(user_module):
    name = user_module("def mean(images):\n    return [np.asarray(i).mean((0, 1)) for i in images]")
    embedder = build_embedder(f"python={name}:mean", device="meta")  # which holds no values
    expected = np.stack([np.asarray(image).mean((0, 1)) for image in MIXED])
    found = embedder(MIXED)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.dtype == np.float32
    assert embedder.name == f"python={name}:mean"
    assert embedder.device.type == "cpu"


def test_python_function_of_a_wrong_shape(user_module):
    name = user_module("def none(images):\n    return [1.0]")
    with pytest.raises(UserError, match=r"must give features of the shape \(3, D\) .* got \(1,\)"):
        build_embedder(f"python={name}:none")(PICTURES)


def fingerprints(specs):
    return [build_embedder(*spec).fingerprint for spec in specs]


def test_fingerprints_tell_embedders_apart(file, clip, dinov2, copy, tmp_path):
    network = tiny_convolution()
    with torch.no_grad():
        network[-1].bias += 1e-3
    changed = save_script(network, tmp_path / "tiny.pt")
    weights = copy(dinov2)
    content = load_file(weights / "model.safetensors")
    content["layernorm.bias"] += 1e-3
    save_file(content, weights / "model.safetensors", metadata={"format": "pt"})
    prepared = shutil.copytree(dinov2, tmp_path / "prepared")
    processor = BitImageProcessor.from_pretrained(prepared, image_mean=[0.5, 0.5, 0.5])
    processor.save_pretrained(prepared)
    specs = [
        ("pixels",),
        ("raw_pixels",),
        (f"torchscript={file}",),
        (f"torchscript={file}", "legacy_dcr"),
        (f"torchscript={changed}",),
        (f"clip={clip}",),
        (f"dinov2={dinov2}",),
        (f"dinov2={dinov2}", "legacy_dcr"),
        (f"dinov2={weights}",),
        (f"dinov2={prepared}",),
    ]
    found = fingerprints(specs)
    assert len(set(found)) == len(specs)
    assert found == fingerprints(specs)


def test_fingerprint_depends_on_content_not_place(file, tmp_path):
    shutil.copy(file, tmp_path / "elsewhere.pt")
    one, other = fingerprints([(f"torchscript={file}",), (f"torchscript={tmp_path}/elsewhere.pt",)])
    assert one == other


def test_fingerprint_of_a_function_changes_with_name_and_module(user_module):
    text = "def one(images):\n    pass\ndef other(images):\n    pass\n"
    name = user_module(text)
    one, other, again = fingerprints([(f"python={name}:{f}",) for f in ("one", "other", "one")])
    assert one == again != other
    user_module(text + "# changed")
    assert fingerprints([(f"python={name}:one",)]) != [one]


@pytest.fixture
def nothing_loads(monkeypatch):
    """Fails the test if weights are loaded, or the network is asked."""

    def load(*_, **__):
        pytest.fail("loaded")

    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr(torch.jit, "load", load)
    monkeypatch.setattr(networks, "AutoModel", load)
    monkeypatch.setattr(networks, "snapshot_download", load)
    monkeypatch.setattr("iet_sd.evaluation.downloads.urlopen", load)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("sscd", r"'sscd' is no embedder\. Expected one of pixels, raw_pixels, sscd_disc_mixup\[="),
        ("", "'' is no embedder"),
        ("pixels=32", "expected nothing after pixels="),
        ("torchscript", "expected torchscript=FILE"),
        ("torchscript=", "expected FILE after torchscript="),
        ("clip", "expected clip=ID_OR_FOLDER"),
        ("python", "expected python=MODULE:FUNCTION"),
        ("torchscript=nowhere.pt", r"nowhere\.pt is not there"),
        ("sscd_disc_mixup=nowhere.pt", r"nowhere\.pt is not there"),
        ("inception=nowhere.pth", r"nowhere\.pth is not there"),
        ("torchscript={tmp}", "is a folder: give a file"),
        ("clip=./no/such/folder", "there is no such folder, nor can a model on the Hub"),
        ("python=no_such_module:f", r"cannot be imported \(ModuleNotFoundError"),
        ("python=math:no_such_function", r"cannot be imported \(AttributeError"),
        ("python=math", r"cannot be imported \(AttributeError"),
        ("python=:f", r"cannot be imported \(ValueError"),
        ("python=math:pi", "is float, not a function"),
    ],
)
def test_specs_that_cannot_work(nothing_loads, tmp_path, spec, says):
    spec = spec.format(tmp=tmp_path)
    for ask in (check_embedder, build_embedder):
        with pytest.raises(UserError, match=says):
            ask(spec)


@pytest.mark.parametrize("kind", ["torchscript", "sscd_disc_large"])
@pytest.mark.parametrize(
    "content", [b"", b"text", {"weight": torch.zeros(2)}, nn.Linear(2, 2), Attack()]
)
def test_what_is_no_torchscript(nothing_loads, tmp_path, kind, content):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"x\.pt is not a TorchScript file.* \(a pickle\) holds"):
        check_embedder(f"{kind}={path}")


def test_bad_file_in_the_cache_is_found(nothing_loads, tmp_path):
    (tmp_path / PUBLISHED["sscd_disc_mixup"].filename).write_bytes(b"text")
    with pytest.raises(UserError, match="is not a TorchScript file"):
        check_embedder("sscd_disc_mixup", cache_dir=tmp_path)


def without(name):
    return lambda folder: (folder / name).unlink()


def with_config(**settings):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


FOLDERS = {
    "no config": (without("config.json"), "has no readable config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "has no readable config.json"),
    "list": (lambda f: (f / "config.json").write_text("[]"), "has no readable config.json"),
    "type": (with_config(model_type="siglip"), "expected a model of type clip; .* says 'siglip'"),
    "pickle": (pickled, r"holds no \.safetensors file"),
    "no preparation": (without("preprocessor_config.json"), "lacks preprocessor_config.json or"),
    "no tokenizer": (without("tokenizer.json"), "lacks tokenizer.json or vocab.json"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_cannot_work(nothing_loads, clip, copy, case):
    change, says = FOLDERS[case]
    folder = copy(clip)
    check_embedder(f"clip={folder}")
    change(folder)
    with pytest.raises(UserError, match=says):
        check_embedder(f"clip={folder}")


def test_clip_is_not_dinov2(nothing_loads, clip):
    with pytest.raises(UserError, match=r"expected a model of type dinov2 or dinov2_with_reg"):
        check_embedder(f"dinov2={clip}")


def test_legacy_needs_no_processor_of_the_model(nothing_loads, dinov2, copy):
    folder = copy(dinov2)
    (folder / "preprocessor_config.json").unlink()
    check_embedder(f"dinov2={folder}", "legacy_dcr")


def test_unknown_preprocessing(nothing_loads):
    with pytest.raises(UserError, match="must be recommended or legacy_dcr; got 'dcr'"):
        check_embedder("pixels", "dcr")


def test_good_specs_pass_without_loading(nothing_loads, file, clip, dinov2, tmp_path):
    torch.save({}, tmp_path / "inception.pth")
    for spec in (
        *("pixels", "raw_pixels", "sscd_disc_mixup", "sscd_disc_large", "inception"),
        *(f"torchscript={file}", f"sscd_disc_mixup={file}", f"inception={tmp_path}/inception.pth"),
        *(f"clip={clip}", f"dinov2={dinov2}", "clip=openai/clip-vit-base-patch32"),
        "python=os.path:join",
    ):
        check_embedder(spec, cache_dir=tmp_path)
