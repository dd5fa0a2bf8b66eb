"""What a run shows: progress bars, tracker, metrics.jsonl, validation pictures, and the result."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from iet_sd import hub
from iet_sd.config import Config
from iet_sd.engine.rounds import Event, RoundDone, ShardDone, State, StepDone
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
        state: State,
        steps_per_round: int,
    ) -> None:
        """Open bars, tracker and metrics.jsonl, going on where ``state`` is."""
        self.config = config
        self.accelerator = accelerator
        self.components = components
        self.output_dir = Path(config.training.output_dir)
        self.state = state
        off = not accelerator.is_main_process
        self.rounds = tqdm(
            total=config.method.num_rounds, initial=state.round, desc="Rounds", disable=off
        )
        self.steps = tqdm(total=steps_per_round, desc="Steps", leave=False, disable=off)
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.metrics = MetricsFile(self.output_dir / "metrics.jsonl", state.history)
            anew = dataclasses.replace(config.training, resume_from_checkpoint=None)
            hub.write_settings(self.output_dir, dataclasses.replace(config, training=anew))
        # A tracker's settings are flat and simple; a list becomes its text.
        flat = {
            k: v if isinstance(v, int | float | str) else str(v)
            for k, v in config.as_dict().items()
        }
        # What a run logged before it was killed and is done again would be there twice.
        again = {"tensorboard": {"purge_step": self._step() + 1}} if self._step() else {}
        name = config.training.tracker_project_name
        accelerator.init_trackers(name, config=flat, init_kwargs=again)

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

    def close(self) -> None:
        """End the bars, so that what is said next has a line of its own."""
        self.steps.close()
        self.rounds.close()

    def finish(self, num_samples: int) -> None:
        """Save the result, the sample grid and the card, and print the rounds. Main process."""
        save_result(self.components, self.config.model, self.output_dir)
        if self.config.training.validation_prompts:
            self._draw().save(self.output_dir / hub.GRID)
        rounds = [line for line in self.metrics.lines if line["kind"] == "round"]
        hub.write_card(self.output_dir, self.config, num_samples, rounds)
        print(table(self.metrics.lines))
        print(f"Saved to {self.output_dir}")

    def _step(self) -> int:
        """The axis of the trackers: steps of all shards, but of ours in the round under way."""
        shards = [shard for event in self.state.history for shard in event.shards]
        progress = self.state.progress
        if progress:
            shards += progress.done
        under_way = progress.counts.steps if progress and progress.shard is not None else 0
        return sum(shard.counts.steps for shard in shards) + under_way

    def _show_step(self, event: StepDone) -> None:
        if event.step > self.steps.n:
            self.steps.update(event.step - self.steps.n)
        self.steps.set_description(f"Round {event.round} shard {event.shard}", refresh=False)
        self.steps.set_postfix(loss=f"{event.loss:.4f}", lr=f"{event.learning_rate:.1e}")
        values = {"step/loss": event.loss, "step/learning_rate": event.learning_rate}
        self.accelerator.log(values, step=self._step())

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
        for line in self.metrics.add(event):
            name = f"shard_{line['shard']}" if line["kind"] == "shard" else "round"
            numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
            # On the axis of the steps: trackers such as wandb drop what goes back on theirs.
            values = {f"{name}/{k}": v for k, v in numbers.items()}
            self.accelerator.log(values, step=self._step())
        every = self.config.training.validation_rounds
        if every and event.round % every == 0:
            picture = self._draw()
            picture.save(self.output_dir / f"validation-{event.round}.png")
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    images = np.asarray(picture)[None]
                    tracker.log_images({"validation": images}, self._step(), dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images({"validation": [picture]}, self._step())

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
