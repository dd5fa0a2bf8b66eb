"""Readings of the model at round boundaries (``--eval_every_rounds``), and the round to keep.

Under ``--output_dir``:

    probe/features/                 of training and held-out images; until the end
    probe/round-3/                  weights of a round that may be the one to keep; until the end
    frontier.png                    the picture
    best/                           the round to keep, and probe.json with its numbers

Readings are part of the checkpoint, so a run that goes on has those of its rounds and no others.
All of it is done by the main process, while others wait where processes next meet.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import Parameter

from iet_sd.config import Config
from iet_sd.data.sources import Source
from iet_sd.engine.proxy import averaged, copy_into
from iet_sd.engine.rounds import RoundDone
from iet_sd.engine.state import State
from iet_sd.engine.store import Tensors
from iet_sd.errors import UserError
from iet_sd.evaluation.embedders import Embedder, build_embedder
from iet_sd.evaluation.frontier import Recommendation, candidates, recommend
from iet_sd.evaluation.picture import draw_frontier
from iet_sd.evaluation.probe import Probe, Reading
from iet_sd.files import atomic_folder, write_text_atomic
from iet_sd.models.loading import Components, as_pipeline
from iet_sd.models.saving import save_result

logger = logging.getLogger("iet_sd")
FOLDER, PICTURE, BEST = "probe", "frontier.png", "best"
_NUMBERS, _WEIGHTS = "probe.json", "weights.safetensors"


def load_embedder(config: Config, is_main: bool, device: torch.device) -> Embedder | None:
    """What readings see images by, on the main process; None without --eval_every_rounds.

    Errors: `UserError` for one that cannot be downloaded or loaded.
    """
    if not is_main or config.probe.eval_every_rounds is None:
        return None
    return build_embedder(
        config.probe.eval_embedder, device=device, cache_dir=config.data.cache_dir
    )


class Prober:
    """Measures the model before training, and after the rounds that the settings name.

    Without an embedder it does nothing.
    """

    def __init__(
        self,
        config: Config,
        components: Components,
        parameters: Mapping[str, Parameter],
        state: State,
        autocast: Callable[[], AbstractContextManager],
        embedder: Embedder | None,
    ) -> None:
        """``parameters`` are the live ones of ``components``; ``embedder`` of `load_embedder`."""
        self.config = config
        self.on, self.embedder = embedder is not None, embedder
        self.components = components
        self.parameters = parameters
        self.state = state
        self.autocast = autocast
        self.output_dir = Path(config.training.output_dir)
        self.folder = self.output_dir / FOLDER
        self.probe: Probe | None = None

    def begin(self, train: Source, heldout: Source | None, found: Path | None) -> None:
        """Prepare, and take the readings that are missing of the start and of the last round done.

        ``found``: the checkpoint to go on from. The live parameters are as the run started, and may
        be others afterwards. Errors: as `Probe`.
        """
        if not self.on:
            return
        config, data = self.config.probe, self.config.data
        self.probe = Probe(
            config,
            data,
            train,
            heldout,
            self.embedder,
            self.config.training.seed,
            self.config.training.train_batch_size,
            self.folder,
        )
        self._take_over(found)
        measured = {reading.round for reading in self.readings}
        if 0 not in measured:
            self._measure(0)
        last = self.state.round
        if last not in measured and last and self._due(self.state.history[-1]):
            self._measure_average(last)

    def after(self, event: RoundDone) -> Reading | None:
        """The reading of a round, if it is due and can be taken."""
        return self._measure_average(event.round) if self.on and self._due(event) else None

    @property
    def readings(self) -> list[Reading]:
        """In the order of the rounds."""
        return [Reading.from_json(probe["reading"]) for probe in self.state.probes]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """For metrics.jsonl, a line a reading."""
        return [reading.line() for reading in self.readings]

    def recommendation(self) -> Recommendation | None:
        """The round to keep; None if nothing says."""
        return recommend(self.readings, self.probe.group_N) if self.on else None

    def draw(self, recommendation: Recommendation | None) -> Image.Image:
        """The picture of `draw_frontier`; there are readings."""
        return draw_frontier(self.readings, recommendation, self.probe.embedder.name)

    def save_best(self, recommendation: Recommendation | None) -> Path | None:
        """Save the round to keep, if that is asked for; the folder that has it.

        The live parameters are others afterwards.
        """
        if not self.on or not self.config.probe.keep_best or recommendation is None:
            return None
        best = self.output_dir / BEST
        readings = {reading.round: reading for reading in self.readings}
        numbers = json.dumps(readings[recommendation.round].line(), indent=2) + "\n"
        # None if there is nothing, or what a run was killed in the middle of.
        there = (best / _NUMBERS).read_text() if (best / _NUMBERS).is_file() else None
        if there == numbers:  # as when a run that was through is started again
            return best
        if there is not None and (kept := json.loads(there)["round"]) not in readings:
            logger.warning(
                "%s stays as it is: it has round %d, of which this run has no reading to compare "
                "with. Move it elsewhere to keep round %d there.",
                best,
                kept,
                recommendation.round,
            )
            return None
        weights = self._weights(recommendation.round)
        shutil.rmtree(best, ignore_errors=True)
        if not weights.is_file():
            logger.warning(
                "The weights of round %d, the one to keep, are no longer there, so there is no "
                "%s: an earlier run has deleted them at its end, or did not measure the round.",
                recommendation.round,
                best,
            )
            return None
        copy_into(self.parameters, load_file(weights))
        save_result(self.components, self.config.model, best)
        write_text_atomic(best / _NUMBERS, numbers)
        return best

    def end(self) -> None:
        """Delete what is needed until the end, the last thing that a run does."""
        if self.on:
            shutil.rmtree(self.folder)

    def _due(self, event: RoundDone) -> bool:
        """Whether ``eval_every_rounds`` are over since the last round that gave a new model.

        Rounds that do not average their proxies give none; the last one does.
        """
        every, last = self.config.probe.eval_every_rounds, self.config.method.num_rounds
        before = [e.round for e in self.state.history if e.aggregated and e.round < event.round]
        passed = event.round // every > max(before, default=0) // every
        return event.aggregated and (passed or event.round == last)

    def _measure_average(self, round: int) -> Reading | None:
        """Of what the run would save: the moving average where there is one."""
        model = self.state.ema or self.state.weights
        with averaged(self.parameters, model, self.state.weights):
            try:
                reading = self._measure(round)
            except (UserError, torch.OutOfMemoryError) as error:
                # Never at the price of the round, whose checkpoint is yet to be written.
                logger.warning("Round %d could not be measured: %s", round, error)
                return None
        if self.config.probe.keep_best:
            self._keep(round, model)
        return reading

    def _measure(self, round: int) -> Reading:
        """Measure what is live, and note it in the state."""
        with self.components.borrowed():
            reading = self.probe.read(round, as_pipeline(self.components), self.autocast)
        probe = {"of": self.probe.fingerprint, "reading": reading.as_json()}
        self.state.probes.append(probe)
        self.state.probes.sort(key=lambda probe: probe["reading"]["round"])
        logger.info("%s", _in_words(reading))
        return reading

    def _take_over(self, found: Path | None) -> None:
        """Let go of readings that cannot be compared with those to come, and of their weights."""
        probes = self.state.probes
        self.state.probes = [p for p in probes if p["of"] == self.probe.fingerprint]
        if len(self.state.probes) < len(probes):
            logger.warning(
                "%d readings are left out: they were taken with other --eval_ settings or data.",
                len(probes) - len(self.state.probes),
            )
        rounds = {reading.round for reading in self.readings}
        there = found.parent / FOLDER if found else self.folder
        if there.resolve() != self.folder.resolve():
            for name in (f"round-{round}" for round in rounds):
                if (there / name).is_dir():
                    shutil.copytree(there / name, self.folder / name, dirs_exist_ok=True)
        self._delete_weights(all_but=rounds)

    def _keep(self, round: int, model: Tensors) -> None:
        """Write the weights of a round, and delete those that cannot be the ones to keep any more.

        Before the round's checkpoint is written: one that has the reading has the weights too.
        """
        left = {reading.round for reading in candidates(self.readings, self.probe.group_N)}
        if round in left:
            with atomic_folder(self._weights(round).parent) as staging:
                tensors = {name: tensor.contiguous() for name, tensor in model.items()}
                save_file(tensors, staging / _WEIGHTS)
        self._delete_weights(all_but=left)

    def _weights(self, round: int) -> Path:
        return self.folder / f"round-{round}" / _WEIGHTS

    def _delete_weights(self, all_but: set[int]) -> None:
        kept = {self._weights(round).parent for round in all_but}
        for path in self.folder.glob("round-*"):
            if path not in kept:
                shutil.rmtree(path)


def _in_words(reading: Reading) -> str:
    excess = reading.excess_score
    return (
        f"{f'round {reading.round}' if reading.round else 'before training'}: memorization score "
        f"{reading.memorization_score.value:.3f}, excess similarity {excess.value:+.3f} "
        f"[{excess.low:+.3f}, {excess.high:+.3f}], held-out loss {reading.heldout_loss.value:.4f}, "
        f"membership AUC {reading.membership_auc.value:.2f} ({reading.seconds:.0f} s)"
    )
