"""Images by the model under evaluation, kept on disk: a run goes on where another one stopped.

Letters in shapes: G generations.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from iet_sd.errors import UserError
from iet_sd.files import atomic_file, write_text_atomic
from iet_sd.sampling import draw, say_what_is_cut
from iet_sd.seeding import seed_for


@dataclass(frozen=True)
class Request:
    """What to draw: with the model's fingerprint, all that an image depends on but rounding."""

    prompts: tuple[str, ...]
    prompt_ids: tuple[str, ...]
    """A name for each prompt, all different: with the seed, it settles the noise of its images."""
    images_per_prompt: int
    seed: int
    resolution: int
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str = ""
    dtype: str = "float32"
    """Precision of the pipeline's weights, as torch names it."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError("There is no prompt to draw.")
        if len(self.prompts) != len(self.prompt_ids):
            raise UserError(
                f"Each prompt needs an id; got {len(self.prompts)} prompts and "
                f"{len(self.prompt_ids)} ids."
            )
        if len(set(self.prompt_ids)) < len(self.prompt_ids):
            twice = next(i for i in self.prompt_ids if self.prompt_ids.count(i) > 1)
            raise UserError(f"The ids of prompts must differ; {twice!r} is there twice.")


class Generations:
    """The images of a request, an `ImageSet`: all of the first prompt, then of the second, ..."""

    def __init__(self, folder: Path, request: Request) -> None:
        """``folder`` holds the images, or will."""
        prompts, images = len(request.prompts), request.images_per_prompt
        self.folder = folder
        self.request = request
        self.prompt_G = np.repeat(np.arange(prompts), images)
        """Index of the prompt of each image."""
        self.image_G = np.tile(np.arange(images), prompts)
        """Number of each image among those of its prompt."""
        pairs = list(zip(self.prompt_G.tolist(), self.image_G.tolist(), strict=True))
        self.ids = [f"{request.prompt_ids[prompt]}-{image}" for prompt, image in pairs]
        # Numbers, since a prompt or its id may be no name for a file.
        self.paths = [folder / f"{prompt:05d}-{image:03d}.png" for prompt, image in pairs]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        """An image, RGB. Errors: `UserError` if it cannot be read."""
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's for a broken PNG
            raise UserError(
                f"{path} cannot be read ({error}). Delete it, and the next run draws it again."
            ) from error

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ids and files, in order."""
        digest = hashlib.sha256()
        for name, path in zip(self.ids, self.paths, strict=True):
            digest.update(f"{name}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def generate(
    request: Request,
    model_fingerprint: str,
    load_pipeline: Callable[[], DiffusionPipeline],
    cache_dir: Path,
    *,
    batch_size: int = 8,
    process_index: int = 0,
    num_processes: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> Generations:
    """The images of ``request``: those that aren't in ``cache_dir`` yet are drawn.

    They lie in ``generations/KEY``, of a key for request and model, beside a ``request.json`` that
    says how they were made. Image i of a prompt depends on the seed, the prompt and its id, and i:
    neither on ``batch_size`` nor on the number of processes. The pipeline is loaded only by a
    process that has something to draw. All processes take part and return the same.
    Errors: `UserError` for images that are not numbers.
    """
    key = hashlib.sha256(json.dumps([asdict(request), model_fingerprint]).encode()).hexdigest()
    generations = Generations(Path(cache_dir) / "generations" / key[:16], request)
    # Shares don't depend on what is missing, as processes may look at different times.
    share = range(process_index, len(generations), num_processes)
    missing = [g for g in share if not generations.paths[g].exists()]
    if missing:
        pipeline = load_pipeline()
        if f"torch.{request.dtype}" != str(pipeline.unet.dtype):
            raise ValueError(f"asked for {request.dtype}, loaded {pipeline.unet.dtype}")
        generations.folder.mkdir(parents=True, exist_ok=True)
        if process_index == 0:  # which draws the first image, however many processes there are
            _write_request(generations, model_fingerprint, pipeline)
            say_what_is_cut(pipeline, request.prompts)
        with tqdm(total=len(missing), desc="Images", disable=process_index > 0) as bar:
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                _draw_batch(pipeline, generations, batch)
                bar.update(len(batch))
    barrier()
    return generations


def _draw_batch(pipeline: DiffusionPipeline, generations: Generations, batch: list[int]) -> None:
    """Draw and save the images of these indices."""
    request = generations.request
    prompts = [int(generations.prompt_G[g]) for g in batch]
    images = [int(generations.image_G[g]) for g in batch]
    drawn = draw(
        pipeline,
        [request.prompts[p] for p in prompts],
        [
            seed_for(request.seed, "generate", request.prompt_ids[p], i)
            for p, i in zip(prompts, images, strict=True)
        ],
        request.resolution,
        request.num_inference_steps,
        request.guidance_scale,
        request.negative_prompt,
    )
    for g, image in zip(batch, drawn, strict=True):
        if not np.isfinite(image).all():
            raise UserError(
                f"The image {generations.ids[g]} is not a number (NaN), in {request.dtype}. Draw "
                "with --mixed_precision no; if that is how it was drawn, the model is broken."
            )
    for g, picture in zip(batch, pipeline.numpy_to_pil(drawn), strict=True):
        with atomic_file(generations.paths[g]) as file:
            picture.save(file, format="PNG")


def _write_request(
    generations: Generations, model_fingerprint: str, pipeline: DiffusionPipeline
) -> None:
    content = {
        "model": model_fingerprint,
        "scheduler": json.loads(pipeline.scheduler.to_json_string()),
        "device": pipeline.device.type,
        **asdict(generations.request),
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_text_atomic(generations.folder / "request.json", text + "\n")
