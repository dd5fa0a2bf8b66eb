"""One update of a proxy by the gradient that a step has left, if that is finite.

All that is not yet known of the step is read here in one go, the losses and the gradient's norm. It
is the only time that the device is waited for where losses decide nothing (no AGC, no TAA).
"""

from collections.abc import Sequence

from iet_sd.devices import read
from iet_sd.engine.proxy import Proxy
from iet_sd.engine.step import Counts, Losses, OnNonfinite, chosen


def update(
    proxy: Proxy,
    counts: Counts,
    trained: list[tuple[int, int]],
    unread: Sequence[Losses],
    scale: float,
    on_nonfinite: OnNonfinite,
) -> None:
    """Update by ``scale`` times the gradient of what is ``trained``, or leave all of it out.

    ``counts`` is changed to what came of it. ``on_nonfinite`` is told what is not finite, "loss" or
    "gradient", and index and timestep of the samples; if it returns, the update is left out. One
    that overflows in fp16 is left out untold, and the loss scale lowered.
    """
    norm, *losses = read(proxy.clip_gradient(scale).unsqueeze(0), *(each.loss for each in unread))
    passes = list(zip(unread, losses, strict=True))
    bad = [sample for of, loss in passes for sample in chosen(of.samples, ~loss.isfinite())]
    if not bad:
        scores = [loss for of, loss in passes if of.are_scores]
        counts.scored += sum(map(len, scores))
        counts.loss_sum += sum(float(loss.sum()) for loss in scores)
        if norm.isfinite():
            proxy.update()
            counts.updates = 1
            return
    counts.trained, counts.augmented, counts.strength_sum = 0, 0, 0.0
    if bad:
        # Before the loss scale is: no scale makes such a gradient finite.
        proxy.leave_out()
        on_nonfinite("loss", bad)
    elif proxy.overflowed():
        return
    else:
        on_nonfinite("gradient", trained)
    counts.nonfinite += 1
