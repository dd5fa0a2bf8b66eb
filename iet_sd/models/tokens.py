"""Captions to tokens, as the pipeline does it: padded and cut to the tokenizer's own length."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INPUT_IDS = ("input_ids", "input_ids_2")
# A call may set how its tokenizer cuts and pads, which fails ("Already borrowed") while that works
# for another thread (huggingface/transformers issue 47085). Of the module: workers get tokenizers.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Tokenize:
    """A caption as the tokens of each of the model's tokenizers; goes to workers as it is."""

    tokenizers: Sequence[Any]

    def __call__(self, caption: str) -> dict[str, Tensor]:
        """``input_ids`` (L,), and ``input_ids_2`` (L,) of a second tokenizer; int64."""
        with _ONE_AT_A_TIME:
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
