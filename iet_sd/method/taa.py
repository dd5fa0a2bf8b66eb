"""Threshold-aware augmentation: the nearer to AGC's threshold, the stronger.

Guan et al. 2025 (arXiv 2502.09434). Shapes: B samples of a batch, Q samples to augment.
"""

import math
from typing import Literal

import torch
from torch import Tensor


def strength(loss_B: Tensor, reference_B: Tensor, threshold: float, sharpness: float) -> Tensor:
    """s = exp(-sharpness |l / threshold - b| / b): float32 (B,), 1 at the threshold, 0 far above.

    0 where there is no mean to compare with: an empty bin (b = 0) or a threshold of 0.
    """
    if threshold == 0:
        return torch.zeros_like(loss_B)
    distance_B = (loss_B / threshold - reference_B).abs() / reference_B
    return torch.where(reference_B > 0, torch.exp(-sharpness * distance_B), 0.0)


def magnitudes(
    strength_Q: Tensor, scale: float, mode: Literal["sample", "batch"], whole: bool = False
) -> list[float]:
    """RandAugment magnitudes (0 to 30) of the samples to augment.

    ``sample``: scale * s, a fraction of a step, or the nearest ``whole`` one. ``batch``:
    int(scale * mean s) for all, as the authors' code has it.
    """
    if mode == "batch" and len(strength_Q):
        return [float(int(scale * strength_Q.mean().item()))] * len(strength_Q)
    found = (scale * strength_Q).tolist()
    return [float(math.floor(each + 0.5)) for each in found] if whole else found


def whole_magnitudes(
    min_strength: float, scale: float, mode: Literal["sample", "batch"]
) -> list[float]:
    """All that `magnitudes` may give as whole ones of strengths from ``min_strength`` to 1."""
    weakest, strongest = (
        int(magnitudes(torch.tensor([s]), scale, mode, whole=True)[0]) for s in (min_strength, 1.0)
    )
    return [float(magnitude) for magnitude in range(weakest, strongest + 1)]
