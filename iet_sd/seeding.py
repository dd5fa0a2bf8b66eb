"""Randomness is derived, not stored: every draw has an address, and its seed is a hash of it.

So a run can stop and go on anywhere, and no result depends on the order in which shards, workers
or processes happen to work.
"""

import hashlib


def seed_for(seed: int, *address: int | str) -> int:
    """The seed of the draw at ``address`` in the run of ``seed``: 63 bits of SHA-256.

    For example ``seed_for(seed, "order", round, shard, epoch)``.
    """
    text = "/".join(str(part) for part in (seed, *address))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
