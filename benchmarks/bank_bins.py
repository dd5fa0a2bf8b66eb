"""How wide may a bin of AGC's bank be? Measures what a bin of neighbouring timesteps mixes up.

    python -m benchmarks.bank_bins --config configs/demo.yaml

The bank compares a sample's loss with the mean loss at its timestep. In a bin of several timesteps
that mean varies from one end to the other, which makes samples at the low end look memorized; with
many bins, each is visited seldom and its mean is old and noisy. For each number of bins: the spread
of the mean loss within a bin, relative to it (the error that width adds), beside the spread of a
sample's loss at one timestep (the noise that is there anyway); and the visits per round.
"""

import argparse
from contextlib import nullcontext

import torch

from iet_sd import arguments
from iet_sd.data.dataset import TrainingImages, collate
from iet_sd.data.shards import visits
from iet_sd.data.sources import load_source
from iet_sd.engine.objective import Objective
from iet_sd.engine.plan import steps_per_round
from iet_sd.method.agc import bin_of
from iet_sd.models.loading import load_components

BINS = (1000, 500, 250, 100, 50, 25, 10, 5)


@torch.no_grad()
def losses(objective: Objective, dataset: TrainingImages, timesteps: int, samples: int):
    """The loss of ``samples`` visits at each of ``timesteps`` evenly spread timesteps: (T, S)."""
    order = visits(0, 0, 0, range(len(dataset)))
    at = torch.arange(timesteps) * 1000 // timesteps
    rows = []
    for t in at:
        batch = collate([dataset[next(order)] for _ in range(samples)])
        rows.append(objective.loss(batch, t.expand(samples), "score"))
    return at, torch.stack(rows)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--timesteps", type=int, default=250)
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    config = arguments.load(["--config", args.config])
    source = load_source(config.data)
    components = load_components(config.model, torch.float32, config.data.cache_dir)
    dataset = TrainingImages(source, components.tokenize, config.data)
    objective = Objective(components, torch.device("cpu"), nullcontext)
    at, loss_TS = losses(objective, dataset, args.timesteps, args.samples)
    mean_T = loss_TS.mean(1)
    noise_T = loss_TS.std(1) / mean_T
    # A smooth curve through the means, so that their own error is not taken for variation.
    smooth_T = torch.nn.functional.avg_pool1d(
        torch.nn.functional.pad(mean_T[None, None], (2, 2), mode="replicate"), 5, 1
    )[0, 0]
    scored = steps_per_round(config, len(dataset)) * config.training.train_batch_size
    print(f"spread of one sample's loss at a timestep: {noise_T.mean():.0%} of the mean\n")
    print("| bins | visits of a bin per round | spread of the mean within a bin | worst bin |")
    print("|---|---|---|---|")
    for bins in BINS:
        bin_T = bin_of(at, bins)
        spreads = torch.stack(
            [
                smooth_T[bin_T == b].std(correction=0) / smooth_T[bin_T == b].mean()
                for b in bin_T.unique()
            ]
        )
        print(
            f"| {bins} | {scored / bins:.1f} | {spreads.square().mean().sqrt():.1%} "
            f"| {spreads.max():.1%} |"
        )


if __name__ == "__main__":
    main()
