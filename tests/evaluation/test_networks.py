import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import transforms
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Model,
)

from iet_sd.errors import UserError
from iet_sd.evaluation import networks
from iet_sd.evaluation.embedders import build_embedder
from iet_sd.evaluation.preprocessing import LEGACY_DCR, SSCD
from tests.networks import (
    EDGE,
    random_inception,
    save_script,
    tiny_clip,
    tiny_convolution,
    tiny_dinov2,
)


def picture(seed, size=(48, 48)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


PICTURES = [picture(0), picture(1), picture(2)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return save_script(tiny_convolution(), tmp_path_factory.mktemp("torchscript") / "tiny.pt")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return tiny_dinov2(tmp_path_factory.mktemp("models"))


def altered(folder, tmp_path, change):
    """A copy of a model with other tensors."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    content = load_file(copy / "model.safetensors")
    change(content)
    save_file(content, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("kind", ["torchscript", "sscd_disc_mixup", "sscd_disc_large"])
@pytest.mark.parametrize("preprocessing", ["recommended", "legacy_dcr"])
def test_torchscript(file, kind, preprocessing):
    embedder = build_embedder(f"{kind}={file}", preprocessing)
    prepare = {"recommended": SSCD, "legacy_dcr": LEGACY_DCR}[preprocessing]
    with torch.no_grad():
        expected = tiny_convolution()(torch.stack([prepare(image) for image in PICTURES]))
    found = embedder(PICTURES)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert embedder.name == f"{kind}=tiny.pt"
    assert embedder.preprocessing == prepare.words
    assert embedder.encode_text is None


def test_traced_network(tmp_path):
    network = tiny_convolution()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.trace(network, torch.zeros(2, 3, 288, 288)).save(tmp_path / "traced.pt")
    found = build_embedder(f"torchscript={tmp_path / 'traced.pt'}")(PICTURES)
    with torch.no_grad():
        expected = network(torch.stack([SSCD(image) for image in PICTURES]))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_network_that_was_saved_while_training(tmp_path):
    path = save_script(tiny_convolution().train(), tmp_path / "training.pt")
    with torch.no_grad():
        expected = tiny_convolution()(torch.stack([SSCD(image) for image in PICTURES]))
    np.testing.assert_allclose(build_embedder(f"torchscript={path}")(PICTURES), expected, atol=1e-6)


def test_network_that_gives_a_tuple(tmp_path):
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor):
            return x.flatten(1), x.flatten(1)

    embedder = build_embedder(f"torchscript={save_script(Pair(), tmp_path / 'pair.pt')}")
    with pytest.raises(UserError, match="got <class 'tuple'>"):
        embedder(PICTURES)


def test_damaged_torchscript(file, tmp_path):
    """Whole by its layout, but not in its weights."""
    content = bytearray(file.read_bytes())
    at = content.index(b"constants.pkl") + 64
    content[at : at + 200] = b"\0" * 200
    (tmp_path / "damaged.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.pt cannot be loaded as TorchScript"):
        build_embedder(f"torchscript={tmp_path / 'damaged.pt'}")


def own(processor, folder):
    return processor.from_pretrained(folder)(PICTURES, return_tensors="pt").pixel_values


def test_clip(clip):
    model = CLIPModel.from_pretrained(clip).eval()
    embedder = build_embedder(f"clip={clip}")
    with torch.no_grad():
        pooled = model.vision_model(own(CLIPImageProcessor, clip)).pooler_output
        expected = model.visual_projection(pooled)
    # The processor that comes by default resizes by torchvision, and so differs in the last bit.
    np.testing.assert_allclose(embedder(PICTURES), expected, atol=0.02)
    assert embedder.name == "clip=clip"
    assert embedder.preprocessing == "the model's own CLIPImageProcessor, shortest edge 32"


def test_clip_prepares_as_its_authors_did(clip):
    """Pillow's bicubic resize, crop, CLIP's mean and std."""
    authors = transforms.Compose(
        [
            transforms.Resize(EDGE, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(EDGE),
            transforms.ToTensor(),
            transforms.Normalize(
                (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
            ),
        ]
    )
    # Sizes at which both cut equally much off either side; else they differ by a pixel.
    for size in ((64, 48), (48, 64), (32, 32), (20, 20)):
        found = build_embedder(f"clip={clip}").preprocess(picture(1, size))
        torch.testing.assert_close(found, authors(picture(1, size)), atol=1e-5, rtol=0)


def test_clip_texts(clip):
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    texts = ["a cat", "a dog and a cat", "", "dog " * 50]
    found = build_embedder(f"clip={clip}").encode_text(texts)
    expected = []
    for text in texts:
        tokens = tokenizer([text], truncation=True, max_length=16, return_tensors="pt").input_ids
        with torch.no_grad():
            pooled = model.text_model(tokens).pooler_output
            expected.append(model.text_projection(pooled)[0].numpy())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == np.float32


def test_tokenizer_that_does_not_know_the_limit(clip, tmp_path):
    folder = altered(clip, tmp_path, lambda _: None)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 10**30}))
    long = ["dog " * 50]
    found = build_embedder(f"clip={folder}").encode_text(long)
    assert np.array_equal(found, build_embedder(f"clip={clip}").encode_text(long))


def test_many_texts(clip, monkeypatch):
    encode = build_embedder(f"clip={clip}").encode_text
    texts = [f"cat {i}" for i in range(7)]
    at_once = encode(texts)
    monkeypatch.setattr(networks, "_TEXTS_AT_ONCE", 3)
    np.testing.assert_allclose(encode(texts), at_once, atol=1e-6)


def test_dinov2(dinov2):
    model = Dinov2Model.from_pretrained(dinov2).eval()
    embedder = build_embedder(f"dinov2={dinov2}")
    with torch.no_grad():
        expected = model(own(BitImageProcessor, dinov2)).last_hidden_state[:, 0]
    np.testing.assert_allclose(embedder(PICTURES), expected, atol=0.05)
    assert embedder.encode_text is None
    with torch.no_grad():
        prepared = torch.stack([embedder.preprocess(image) for image in PICTURES])
        exact = model(prepared).last_hidden_state[:, 0]
    np.testing.assert_allclose(embedder(PICTURES), exact, atol=1e-6)


def test_legacy_preprocessing_of_transformers(dinov2):
    embedder = build_embedder(f"dinov2={dinov2}", "legacy_dcr")
    assert torch.equal(embedder.preprocess(picture(0)), LEGACY_DCR(picture(0)))
    model = Dinov2Model.from_pretrained(dinov2).eval()
    with torch.no_grad():
        expected = model(torch.stack([LEGACY_DCR(i) for i in PICTURES])).last_hidden_state[:, 0]
    np.testing.assert_allclose(embedder(PICTURES), expected, atol=1e-5)


def test_lacking_weights(clip, tmp_path):
    folder = altered(clip, tmp_path, lambda content: content.pop("visual_projection.weight"))
    with pytest.raises(UserError, match=r"lacks 1 of the weights .* visual_projection\.weight"):
        build_embedder(f"clip={folder}")


def test_weights_of_another_shape(clip, tmp_path):
    folder = altered(clip, tmp_path, lambda c: c.update({"logit_scale": torch.zeros(2)}))
    with pytest.raises(UserError, match="copy cannot be loaded: "):
        build_embedder(f"clip={folder}")


def test_damaged_safetensors(dinov2, tmp_path):
    folder = altered(dinov2, tmp_path, lambda _: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="copy cannot be loaded: "):
        build_embedder(f"dinov2={folder}")


def test_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"^clip=openai/none: not a folder here, and the Hub "):
        build_embedder("clip=openai/none", cache_dir=tmp_path)


def offline(*_, **__):
    raise OSError("no network\nand more lines")


def test_model_from_the_hub(dinov2, tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, **settings):
        asked.update(settings, name=name)
        return str(dinov2)

    monkeypatch.setattr(networks, "snapshot_download", snapshot_download)
    embedder = build_embedder("dinov2=facebook/dinov2-tiny", cache_dir=tmp_path)
    assert asked["name"] == "facebook/dinov2-tiny"
    assert asked["cache_dir"] == tmp_path
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in asked["allow_patterns"])
    assert embedder.name == "dinov2=facebook/dinov2-tiny"
    assert embedder.fingerprint == build_embedder(f"dinov2={dinov2}").fingerprint


def test_inception(tmp_path):
    path = tmp_path / "weights.pth"
    network = random_inception(path)
    embedder = build_embedder(f"inception={path}")
    images = PICTURES[:2]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    (expected,) = network(pixels)
    found = embedder(images)
    assert found.shape == (2, 2048)
    assert found.std() > 0
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert embedder.name == "inception=weights.pth"


@pytest.mark.parametrize("content", [{"fc.weight": torch.zeros(1)}, [1, 2]])
def test_inception_of_other_weights(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not hold the weights of torch-fidelity"):
        build_embedder(f"inception={tmp_path / 'other.pth'}")


class Attack:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_inception_does_not_unpickle(tmp_path):
    torch.save({"x": Attack()}, tmp_path / "attack.pth")
    with pytest.raises(UserError, match=r"attack\.pth does not hold the weights") as error:
        build_embedder(f"inception={tmp_path / 'attack.pth'}")
    # Torch's own text says how to run it all the same.
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\3\4 half an archive"])
def test_inception_of_no_weights(tmp_path, content):
    (tmp_path / "no.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"no\.pth does not hold the weights"):
        build_embedder(f"inception={tmp_path / 'no.pth'}")


def test_loading_is_quiet(file, clip, capsys):
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_embedder(f"torchscript={file}")
    build_embedder(f"clip={clip}")
    transformers.utils.logging.enable_progress_bar()
    assert capsys.readouterr().out == ""
