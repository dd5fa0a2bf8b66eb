"""What a run shows: progress bars, tracker, metrics.jsonl, validation pictures, and the result."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from iet_sd import hub
from iet_sd.config import Config
from iet_sd.engine.rounds import Event, RoundDone, ShardDone, StepDone
from iet_sd.engine.tracking import MetricsFile, table
from iet_sd.models.loading import Components, as_pipeline
from iet_sd.models.saving import save_result
from iet_sd.sampling import grid, sample

logger = logging.getLogger("iet_sd")


class Reporter:
    """Turns the events of training into what people and tools read; on the main process."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        components: Components,
        rounds_done: int,
        steps_per_round: int,
    ) -> None:
        """Open bars, tracker and metrics.jsonl, going on after ``rounds_done`` rounds."""
        self.config = config
        self.accelerator = accelerator
        self.components = components
        self.output_dir = Path(config.training.output_dir)
        self.lines: list[dict[str, Any]] = []
        self.steps_seen = 0
        off = not accelerator.is_main_process
        self.rounds = tqdm(
            total=config.method.num_rounds, initial=rounds_done, desc="Rounds", disable=off
        )
        self.steps = tqdm(total=steps_per_round, desc="Steps", leave=False, disable=off)
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.metrics = MetricsFile(self.output_dir / "metrics.jsonl", rounds_done)
            self.lines = self.metrics.kept
            mine = [line for line in self.lines if line["kind"] == "shard"]
            mine = [line for line in mine if line["shard"] % accelerator.num_processes == 0]
            self.steps_seen = sum(line["steps"] for line in mine)
            hub.write_settings(self.output_dir, config)
        # A tracker's settings are flat and simple; a list becomes its text.
        flat = {
            k: v if isinstance(v, int | float | str) else str(v)
            for k, v in config.as_dict().items()
        }
        accelerator.init_trackers(config.training.tracker_project_name, config=flat)

    def show(self, event: Event) -> None:
        """One event, on the main process; nothing on the others."""
        if not self.accelerator.is_main_process:
            return
        if isinstance(event, StepDone):
            self._show_step(event)
        elif isinstance(event, ShardDone):
            self._show_shard(event)
        else:
            self._show_round(event)

    def finish(self, num_samples: int) -> None:
        """Save the result, the sample grid and the card, and print the rounds. Main process."""
        self.steps.close()
        self.rounds.close()
        save_result(self.components, self.config.model, self.output_dir)
        if self.config.training.validation_prompts:
            self._draw().save(self.output_dir / hub.GRID)
        rounds = [line for line in self.lines if line["kind"] == "round"]
        hub.write_card(self.output_dir, self.config, num_samples, rounds)
        print(table(self.lines))
        print(f"Saved to {self.output_dir}")

    def _show_step(self, event: StepDone) -> None:
        self.steps_seen += 1
        if event.progress > self.steps.n:
            self.steps.update(event.progress - self.steps.n)
        self.steps.set_description(f"Round {event.round} shard {event.shard}", refresh=False)
        self.steps.set_postfix(loss=f"{event.loss:.4f}", lr=f"{event.learning_rate:.1e}")
        values = {"step/loss": event.loss, "step/learning_rate": event.learning_rate}
        self.accelerator.log(values, step=self.steps_seen)

    def _show_shard(self, event: ShardDone) -> None:
        self.steps.reset()
        if self.config.method.step_unit == "update" and event.counts.updates < self.steps.total:
            logger.warning(
                "round %d, shard %d ended after %d of %d updates: of %d samples %d were skipped. "
                "Lower --agc_threshold.",
                event.round,
                event.shard,
                event.counts.updates,
                self.steps.total,
                event.counts.scored,
                event.counts.skipped,
            )

    def _show_round(self, event: RoundDone) -> None:
        self.rounds.update()
        lines = self.metrics.add(event)
        self.lines += lines
        for line in lines:
            name = f"shard_{line['shard']}" if line["kind"] == "shard" else "round"
            numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
            # On the axis of the steps: trackers such as wandb drop what goes back on theirs.
            values = {f"{name}/{k}": v for k, v in numbers.items()}
            self.accelerator.log(values, step=self.steps_seen)
        every = self.config.training.validation_rounds
        if every and event.round % every == 0:
            picture = self._draw()
            picture.save(self.output_dir / f"validation-{event.round}.png")
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    images = np.asarray(picture)[None]
                    tracker.log_images({"validation": images}, self.steps_seen, dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images({"validation": [picture]}, self.steps_seen)

    def _draw(self) -> Image.Image:
        """The validation prompts by the live model, as one sheet."""
        training = self.config.training
        with self.accelerator.autocast():
            rows = sample(
                as_pipeline(self.components),
                training.validation_prompts,
                training.num_validation_images,
                training.seed,
                self.config.data.resolution,
                training.validation_inference_steps,
                training.validation_guidance_scale,
            )
        return grid(rows, training.validation_prompts)
