"""Captions to tokens, as the pipeline does it: padded and cut to the tokenizer's own length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INPUT_IDS = ("input_ids", "input_ids_2")


@dataclass(frozen=True)
class Tokenize:
    """A caption as the tokens of each of the model's tokenizers; goes to workers as it is."""

    tokenizers: Sequence[Any]

    def __call__(self, caption: str) -> dict[str, Tensor]:
        """``input_ids`` (L,), and ``input_ids_2`` (L,) of a second tokenizer; int64."""
        return {
            name: tokenizer(
                caption,
                max_length=tokenizer.model_max_length,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).input_ids[0]
            for name, tokenizer in zip(INPUT_IDS, self.tokenizers, strict=False)
        }

    def batch(self, captions_B: Sequence[str]) -> dict[str, Tensor]:
        """The same of several captions: (B, L)."""
        each = [self(caption) for caption in captions_B]
        return {name: torch.stack([tokens[name] for tokens in each]) for name in each[0]}
