"""The command push, and what a token must not be found in."""

from iet_sd.models import saving
from tests.hub_server import TOKEN

UNET = "unet/diffusion_pytorch_model.safetensors"
LORA, KOHYA = saving.LORA, saving.KOHYA_LORA
COMMIT, UPLOAD = "POST /api/models/.*/commit/", "PUT /lfs/"


def flags(folder, **given):
    """Of the command push."""
    given = {"hub_token": TOKEN, "hub_model_id": "me/cats"} | given
    return ["push", str(folder), *(f"--{k}={v}" for k, v in given.items() if v is not None)]


def nowhere(token, folder, said):
    """The token is in no file of ``folder``, and in nothing that was said."""
    texts = [path for path in folder.rglob("*") if path.is_file()]
    assert texts
    assert [path for path in texts if token.encode() in path.read_bytes()] == []
    assert token not in said.out + said.err
