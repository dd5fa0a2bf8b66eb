"""Settings of the evaluation during training."""

from dataclasses import dataclass

from iet_sd.config.checks import not_negative, positive
from iet_sd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A small evaluation between rounds, which says what round to keep."""

    eval_every_rounds: int | None = None
    """Measure memorization and held-out loss before training, after every so many rounds (the next
    that averages, --aggregate_every) and after the last; at the end say what round to keep. Needs
    held-out images. Default: never."""
    eval_prompts: int = 64
    """Captions of the training set that are drawn, the same every time, from the same noise."""
    eval_inference_steps: int = 25
    """Denoising steps of these images."""
    eval_guidance_scale: float = 7.5
    """Classifier-free guidance of these images."""
    eval_samples: int = 128
    """Training and held-out images whose denoising loss is taken, the same every time."""
    eval_timesteps: int = 10
    """Timesteps, spread evenly, at which that loss is taken."""
    eval_embedder: str = "pixels"
    """What similarity is measured by, as one of --embedders of `python -m iet_sd evaluate`."""
    keep_best: bool = False
    """Save the round to keep beside the last, under best/. Until the end, the weights of rounds
    that may be it lie under --output_dir: 4 bytes a trained parameter for each."""

    def __post_init__(self) -> None:
        positive(self, "eval_every_rounds", "eval_inference_steps", "eval_timesteps")
        not_negative(self, "eval_guidance_scale")
        for name in ("eval_prompts", "eval_samples"):
            if getattr(self, name) < 2:
                raise UserError(
                    f"--{name} must be at least 2, or there is no interval; got "
                    f"{getattr(self, name)}."
                )
        if self.keep_best and not self.eval_every_rounds:
            raise UserError("--keep_best needs --eval_every_rounds, which says what round it is.")
