"""What a run shows: progress bars, tracker, metrics.jsonl, validation pictures, and the result."""

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError
from torch.nn import Parameter
from tqdm.auto import tqdm

from iet_sd.config import Config
from iet_sd.engine.proxy import averaged
from iet_sd.engine.rounds import Event, RoundDone, ShardDone, State, StepDone
from iet_sd.engine.tracking import MetricsFile, table
from iet_sd.evaluation.frontier import Recommendation
from iet_sd.files import atomic_file
from iet_sd.hub.background import BackgroundPush
from iet_sd.hub.card import write_card, write_settings
from iet_sd.hub.contents import GRID, METRICS, SETTINGS
from iet_sd.hub.push import Repository
from iet_sd.models.loading import Components, as_pipeline
from iet_sd.models.saving import save_non_ema, save_result
from iet_sd.probing import PICTURE, Prober
from iet_sd.sampling import grid, sample

logger = logging.getLogger("iet_sd")


@contextmanager
def _dispensable(picture: str) -> Iterator[None]:
    """Inside, what goes wrong is a warning: no picture is worth the round, or the result's card."""
    try:
        yield
    except Exception as error:  # anything: also of the device, the disk, or a tracker
        kind = type(error).__name__
        logger.warning("%s is not drawn: %s: %s. The run goes on.", picture, kind, error)


class Reporter:
    """Turns the events of training into what people and tools read; on the main process."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        components: Components,
        parameters: Mapping[str, Parameter],
        state: State,
        steps_per_round: int,
        prober: Prober,
        repository: Repository | None = None,
    ) -> None:
        """Open bars, tracker and metrics.jsonl, going on where ``state`` is.

        ``repository``: where --hub_push_rounds pushes.
        """
        self.config = config
        self.accelerator = accelerator
        self.components = components
        self.parameters = parameters
        self.output_dir = Path(config.training.output_dir)
        self.state = state
        self.prober = prober
        self.background = (
            BackgroundPush(repository, self.output_dir)
            if repository and config.push.hub_push_rounds
            else None
        )
        off = not accelerator.is_main_process
        self.rounds = tqdm(
            total=config.method.num_rounds, initial=state.round, desc="Rounds", disable=off
        )
        self.steps = tqdm(total=steps_per_round, desc="Steps", leave=False, disable=off)
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            path = self.output_dir / METRICS
            self.metrics = MetricsFile(path, state.history, prober.lines)
        # A tracker's settings are flat and simple; a list becomes its text.
        flat = {
            k: v if isinstance(v, int | float | str) else str(v)
            for k, v in config.as_dict().items()
        }
        # What a run logged before it was killed and is done again would be there twice.
        again = {"tensorboard": {"purge_step": self._step() + 1}} if self._step() else {}
        starts = not self._step() and prober.lines
        if starts:
            again = {"tensorboard": {"purge_step": 0}}
        name = config.training.tracker_project_name
        accelerator.init_trackers(name, config=flat, init_kwargs=again)
        if starts:
            self._log("eval", prober.lines[0])

    def show(self, event: Event) -> None:
        """One event, on the main process; nothing on the others."""
        if not self.accelerator.is_main_process:
            return
        if isinstance(event, StepDone):
            self._show_step(event)
        elif isinstance(event, ShardDone):
            self.steps.reset()
        else:
            self._show_round(event)

    def close(self) -> None:
        """End the bars, so that what is said next has a line of its own."""
        self.steps.close()
        self.rounds.close()
        if self.background is not None:
            self.background.close()

    def finish(self, num_samples: int) -> None:
        """Save the result, the sample grid and the card, and print the rounds. Main process."""
        state, model = self.state, self.config.model
        if state.ema:
            save_non_ema(self.components, model, self.output_dir)
        with averaged(self.parameters, state.ema, state.weights):
            save_result(self.components, model, self.output_dir)
            if self.config.training.validation_prompts:
                with _dispensable(GRID):
                    self._save_picture(self._draw(), GRID)
        advice = self._advise()
        self._write_card(self.output_dir, num_samples, GRID, advice.text if advice else "")
        print(table(self.metrics.lines))
        if advice is not None:
            print(advice.text)
        print(f"Saved to {self.output_dir}")
        if best := self.prober.save_best(advice):
            write_settings(best, self.config)  # by which `evaluate` finds the data
            for name in (METRICS, PICTURE):
                if (self.output_dir / name).is_file():
                    shutil.copyfile(self.output_dir / name, best / name)
            self._write_card(best, num_samples, "", advice.text, advice.round)
        self.prober.end()

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

    def _show_round(self, event: RoundDone) -> None:
        self.rounds.update()
        for shard in event.shards:
            self._warn_if_short(shard)
        for line in self.metrics.add(event):
            name = f"shard_{line['shard']}" if line["kind"] == "shard" else "round"
            self._log(name, line)
        reading = self.prober.after(event)
        if reading is not None:
            self.metrics.append(reading.line())
            self._log("eval", reading.line())
        if self._draws_after(event):
            name = f"validation-{event.round}.png"
            with _dispensable(name):
                with averaged(self.parameters, self.state.ema, self.state.weights):
                    picture = self._draw()
                self._save_picture(picture, name)
                self._log_picture("validation", picture)
        if self.background is not None:
            self._push_round(event.round)

    def _warn_if_short(self, shard: ShardDone) -> None:
        """Say that a shard, of whichever process, has made fewer updates than a round has."""
        counts, updates = shard.counts, self.steps.total
        if self.config.method.step_unit != "update" or counts.updates >= updates:
            return
        advice = "Lower --agc_threshold."
        if not counts.skipped:
            advice = "Look for overflows: lower --learning_rate, or train in bf16 or fp32."
        logger.warning(
            "round %d, shard %d ended after %d of %d updates: of %d samples %d were skipped. %s",
            shard.round,
            shard.shard,
            counts.updates,
            updates,
            counts.scored,
            counts.skipped,
            advice,
        )

    def _push_round(self, round: int) -> None:
        """Have the result of a round pushed, if it is due; the last comes by itself."""
        free = self.background.is_free()
        every, last = self.config.push.hub_push_rounds, self.config.method.num_rounds
        if round % every or round == last:
            return
        if not free:
            logger.info("round %d is not pushed, as an earlier one still is", round)
            return
        try:
            self.background.start(round, partial(self._save_round, round))
        except (OSError, SafetensorError) as error:
            logger.warning("round %d is not pushed: %s. Training goes on.", round, error)

    def _save_round(self, round: int, folder: Path) -> None:
        """What of the result there is by now."""
        model = dataclasses.replace(self.config.model, merge_lora=False)
        with averaged(self.parameters, self.state.ema, self.state.weights):
            save_result(self.components, model, folder)
        # All pictures so far: a push deletes those that an earlier one had and this one has not.
        pictures = [f"validation-{number}.png" for number in range(1, round + 1)]
        for name in (SETTINGS, METRICS, *pictures):
            if (self.output_dir / name).is_file():
                shutil.copyfile(self.output_dir / name, folder / name)
        self._write_card(folder, len(self.state.shard_of_N), pictures[-1])

    def _write_card(
        self,
        folder: Path,
        num_samples: int,
        picture: str,
        advice: str = "",
        round: int | None = None,
    ) -> None:
        rounds = [line for line in self.metrics.lines if line["kind"] == "round"]
        pipeline = self.components.family.pipeline.__name__
        write_card(folder, self.config, num_samples, rounds, pipeline, picture, advice, round)

    def _log(self, name: str, line: dict[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl, to the trackers."""
        values = {f"{name}/{k}": v for k, v in line.items() if isinstance(v, int | float)}
        # On the axis of the steps: trackers such as wandb drop what goes back on theirs.
        self.accelerator.log(values, step=self._step())

    def _log_picture(self, name: str, picture: Image.Image) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                images = np.asarray(picture)[None]
                tracker.log_images({name: images}, self._step(), dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [picture]}, self._step())

    def _save_picture(self, picture: Image.Image, name: str) -> None:
        """Whole or not at all: a push may come any time."""
        with atomic_file(self.output_dir / name) as file:
            picture.save(file, "PNG")

    def _advise(self) -> Recommendation | None:
        """The round to keep, noted and drawn, if rounds were measured."""
        if not self.prober.on:
            return None
        advice = self.prober.recommendation()
        with _dispensable(PICTURE):
            picture = self.prober.draw(advice)
            self._save_picture(picture, PICTURE)
            self._log_picture("frontier", picture)
        if advice is not None:
            self.metrics.append(advice.line())
        return advice

    def _draws_after(self, event: RoundDone) -> bool:
        """Whether validation images are due, by rounds or by passes over the data."""
        training = self.config.training
        if not training.validation_prompts:
            return False
        if training.validation_rounds:
            return event.round % training.validation_rounds == 0
        samples = int((self.state.shard_of_N >= 0).sum()) * training.validation_epochs
        scored = [sum(s.counts.scored for s in done.shards) for done in self.state.history]
        total = sum(scored[: event.round])
        before = total - scored[event.round - 1]
        return samples > 0 and total // samples > before // samples

    def _draw(self) -> Image.Image:
        """The validation prompts by the live model, as one sheet."""
        training = self.config.training
        with self.accelerator.autocast(), self.components.borrowed():
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
