"""``train_iet_sd.py``: parse, check, build, loop over events, finish.

Nothing heavy is imported until the settings are known to be sound, so ``--help`` and a wrong flag
answer at once.
"""

import dataclasses
import logging
import secrets
from collections.abc import Sequence
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from iet_sd.arguments import load
from iet_sd.cli.common import make_accelerator, status_of
from iet_sd.cli.push import check_repository, hide_from_trackers, make_repository, push_result
from iet_sd.config import Config
from iet_sd.engine.stopping import Signals
from iet_sd.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from iet_sd.data.sources import Source
    from iet_sd.engine.beforehand import Beforehand
    from iet_sd.engine.checkpoint import Checkpoint
    from iet_sd.hub.push import Repository

logger = logging.getLogger("iet_sd")
_WAY_ON = (
    "Checkpoints written before are whole: make room, then go on with "
    "--resume_from_checkpoint latest."
)


def train(argv: Sequence[str]) -> int:
    """Run ``train_iet_sd.py``; returns the exit status."""

    def command() -> None:
        with Signals() as signals, ExitStack() as at_end:
            _train(load(argv), signals, at_end)

    return status_of(command, _WAY_ON)


def _train(config: Config, signals: Signals, at_end: ExitStack) -> None:
    """Check everything that can be checked without weights, then train."""
    from accelerate.utils import ProjectConfiguration

    from iet_sd.cli.output_dir import open_checkpoint, take_output_dir
    from iet_sd.data.cache import cache_root
    from iet_sd.data.shards import split
    from iet_sd.data.sources import load_source
    from iet_sd.engine import plan, remarks
    from iet_sd.engine.beforehand import choose
    from iet_sd.engine.caching import fit
    from iet_sd.engine.checkpoint import require_same
    from iet_sd.engine.collectives import from_main, main_first
    from iet_sd.engine.identity import identity
    from iet_sd.engine.objective import check_dream
    from iet_sd.engine.optimizer import check_optimizer
    from iet_sd.engine.sizes import meta_components
    from iet_sd.models.attention import check_attention
    from iet_sd.models.finding import check_model
    from iet_sd.models.loading import prediction_type
    from iet_sd.models.speed import check_compile

    hide_from_trackers(config.hub.hub_token)
    output_dir = Path(config.training.output_dir)
    check_model(config.model)
    check_attention(config.model.attention_backend)
    check_optimizer(config.training)
    _check_tracker(config.training.report_to)

    logging_dir = output_dir / config.training.logging_dir
    precision = config.training.mixed_precision
    # What a GPU will do may be planned where there is none.
    is_planned = config.training.dry_run and precision == "fp16"
    accelerator = make_accelerator(
        "no" if is_planned else precision,
        timeout=timedelta(seconds=config.training.ddp_timeout),
        log_with=None if config.training.report_to == "none" else config.training.report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(logging_dir)),
    )
    plan.check_processes(config, accelerator.num_processes)
    check_compile(config.model, accelerator.device)
    processes = accelerator.process_index, accelerator.num_processes
    from_main(lambda: take_output_dir(config, at_end), *processes)
    found = from_main(lambda: open_checkpoint(config), *processes)
    repository = check_repository(config, *processes)
    # By all of the model but its weights, before the data are loaded: that takes longer.
    predicts = from_main(lambda: prediction_type(config.model, config.data.cache_dir), *processes)
    check_dream(config.training.dream, predicts)
    seed = config.training.seed
    if seed is None and found:
        seed = found.identity["seed"]
    elif seed is None:
        seed = from_main(lambda: secrets.randbelow(2**31), *processes)
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(
            config.training, seed=seed, mixed_precision=precision or accelerator.mixed_precision
        ),
    )

    with main_first(*processes):
        source = load_source(config.data)
        heldout = _load_heldout(config, source)
    for name, reason in source.excluded:
        logger.warning("left out %s: %s", name, reason)
    method = config.method
    shard_of_N = split(source.groups, method.num_shards, seed, method.shard_split)
    visits = source.visits_per_epoch(shard_of_N, config.training.train_batch_size)
    steps = plan.steps_per_round(config, visits)
    if found:  # before anything is loaded or encoded
        known = identity(config, steps, "", source.fingerprint())
        require_same(found, known, but={"model"})
    remarks.warn(config, steps)
    beforehand = choose(config, source, plan.visits(config, steps))
    if config.training.dry_run:
        if accelerator.is_main_process:
            sizes = [int((shard_of_N == shard).sum()) for shard in range(method.num_shards)]
            needs = plan.estimate(config, steps, accelerator.num_processes)
            print(plan.describe(config, sizes, steps, needs, accelerator.device))
            parts = meta_components(config.model, config.data.cache_dir)
            beforehand = beforehand.without(fit(config, parts, beforehand)[1])
            kept = plan.gib(sum(beforehand.sizes(config).values()))
            print(f"cache:     {kept} under {cache_root(config.data.cache_dir)}")
            print(f"           {beforehand.describe()}")
        return
    try:
        _run(
            config,
            source,
            beforehand,
            heldout,
            shard_of_N,
            steps,
            found,
            repository,
            accelerator,
            signals,
        )
    finally:
        accelerator.end_training()
    # Last of all: others don't wait for it.
    if repository is not None:
        push_result(output_dir, repository, signals)


def _run(
    config: Config,
    source: "Source",
    beforehand: "Beforehand",
    heldout: "Source | None",
    shard_of_N: "Tensor",
    steps: int,
    found: "Checkpoint | None",
    repository: "Repository | None",
    accelerator: "Accelerator",
    signals: Signals,
) -> None:
    """Load the model, train it round by round, and save the result."""
    import torch

    from iet_sd.cli.output_dir import make_way
    from iet_sd.engine import plan
    from iet_sd.engine.caching import cached_images
    from iet_sd.engine.checkpoint import require_same
    from iet_sd.engine.checkpointer import Checkpointer
    from iet_sd.engine.collectives import from_main, wait
    from iet_sd.engine.identity import identity
    from iet_sd.engine.objective import Objective
    from iet_sd.engine.rounds import Trainer
    from iet_sd.engine.store import open_store
    from iet_sd.hub.card import write_settings
    from iet_sd.models.adapter import lora_pairs, make_trainable
    from iet_sd.models.attention import enable_attention
    from iet_sd.models.fingerprint import fingerprint
    from iet_sd.models.loading import load_components
    from iet_sd.models.speed import place
    from iet_sd.probing import Prober, load_embedder
    from iet_sd.reporting import Reporter
    from iet_sd.seeding import seed_for

    training, device = config.training, accelerator.device
    # Before an earlier run makes way: it may have to be downloaded.
    embedder = load_embedder(config, accelerator.is_main_process, device)
    dtype = plan.weight_dtype(training.mixed_precision)
    components = load_components(config.model, dtype, config.data.cache_dir)
    components.latent_size(config.data.resolution)
    parameters = make_trainable(components, config.model, seed_for(training.seed, "adapter"))
    processes = accelerator.process_index, accelerator.num_processes
    files = components.folder, components.variant, components.vae_folder
    model = from_main(lambda: fingerprint(*files), *processes)
    shared = identity(config, steps, model, source.fingerprint())
    if found:
        require_same(found, shared)
    # Before the UNet takes its room on the device.
    components.device = device
    dataset = cached_images(config, source, components, beforehand, *processes)
    place(components, config, device)
    backend = config.model.attention_backend
    attention = enable_attention(components.unet, backend, device, dtype)
    if training.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    logger.info(
        "%d images in %d shards, %d rounds of %d steps; %d x %s, attention by %s, seed %d",
        int((shard_of_N >= 0).sum()),
        config.method.num_shards,
        config.method.num_rounds,
        steps,
        accelerator.num_processes,
        device.type,
        attention,
        training.seed,
    )
    trainer = Trainer(
        config=config,
        seed=training.seed,
        steps_per_round=steps,
        objective=Objective(
            components,
            device,
            accelerator.autocast,
            training.noise_offset,
            training.snr_gamma,
            training.input_perturbation,
            training.dream,
        ),
        dataset=dataset,
        parameters=parameters,
        lora_pairs=lora_pairs(parameters),
        device=device,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    output_dir = Path(training.output_dir)
    make_repository(config, repository, *processes)

    def take_folder() -> None:
        make_way(config, found)
        write_settings(output_dir, config)  # by which the folder is known as a run's

    from_main(take_folder, *processes)
    with open_store(training.proxy_store, output_dir, *processes) as store:
        state = trainer.start(shard_of_N, store)
        checkpointer = Checkpointer(training, trainer, state, shared, signals)
        checkpointer.load(found)
        prober = Prober(config, components, parameters, state, accelerator.autocast, embedder)
        prober.begin(source, heldout, found and found.folder)
        checkpointer.begin(found)
        reporter = Reporter(
            config, accelerator, components, parameters, state, steps, prober, repository
        )
        with closing(reporter):
            for event in trainer.run(state):
                reporter.show(event)
                checkpointer.after(event)
    if accelerator.is_main_process:
        reporter.finish(len(source.sample_ids))
    wait(accelerator.num_processes)


def _load_heldout(config: Config, train: "Source") -> "Source | None":
    """The images that --eval_every_rounds compares with.

    Errors: as `load_heldout` and `require_images`; without --eval_every_rounds for what is not
    there.
    """
    from iet_sd.evaluation.heldout import load_heldout, require_heldout_split, require_images

    if config.probe.eval_every_rounds is None:
        # For `evaluate`, which reads of them in the settings that are written.
        folder = config.data.heldout_data_dir
        if folder is not None and not Path(folder).expanduser().exists():
            raise UserError(f"--heldout_data_dir {folder} is not there. Expected a folder.")
        if config.data.heldout_split:
            require_heldout_split(config.data)
        return None
    from iet_sd.evaluation.embedders import check_embedder

    check_embedder(config.probe.eval_embedder, cache_dir=config.data.cache_dir)
    heldout = load_heldout(config.data, train)
    require_images("--eval_every_rounds", train=train, heldout=heldout)
    return heldout


def _check_tracker(name: str) -> None:
    """Errors: `UserError` for a tracker whose package is missing."""
    import importlib.util

    package = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet_ml"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"--report_to {name} needs the package {package}: pip install {package}, or use "
            "--report_to none (metrics.jsonl is written anyway)."
        )
