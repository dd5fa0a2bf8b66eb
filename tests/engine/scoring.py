"""Steps by hand: of which method, on which batches."""

from iet_sd.data.dataset import collate
from iet_sd.data.shards import batches

METHOD = {"num_shards": 1, "msr": False, "bank_bins": 1, "agc_threshold": 0.95}


def loaded(trainer, seed, size=8):
    """Batches of all samples."""
    sizes = trainer.dataset.source.sizes
    for visits in batches(seed, 1, 0, range(16), size, sizes):
        yield collate([trainer.dataset[visit] for visit in visits])


def clear(trainer):
    for p in trainer.parameters.values():
        p.grad = None
