"""Proxies on disk train to the same bits as in memory, and take no memory while they wait."""

import contextlib
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from iet_sd.engine import store as stores
from iet_sd.engine.proxy import MOMENTS
from iet_sd.engine.rounds import ShardDone
from iet_sd.engine.store import FOLDER, DiskStore, open_store
from iet_sd.errors import UserError
from tests.compare import equal

RUN = {"num_shards": 3, "num_rounds": 3, "steps_per_round": 2}


@pytest.mark.parametrize(
    "given",
    [
        {"preset": "paper"},
        {"train_mode": "lora", "proxy_optimizer": "average"},
        {"proxy_optimizer": "reset", "outer_momentum": 0.5},
    ],
    ids=["paper", "lora, average", "reset, outer"],
)
def test_the_result_is_that_of_memory_bit_for_bit(given, settings, trainer_for, tmp_path):
    results = []
    for kind in ("memory", "disk"):
        with open_store(kind, tmp_path, 0, 1) as store:
            trainer, state = trainer_for(settings(**RUN, **given), store)
            on_disk = [
                (tmp_path / FOLDER / f"{event.shard}.safetensors").is_file()
                for event in trainer.run(state)
                if isinstance(event, ShardDone)
            ]
            waiting = {
                f"{k}/{n}": t for k, p in state.proxies.items() for n, t in p.tensors().items()
            }
            results.append((state.weights, state.moments, waiting))
        # At a shard's end its proxy is still live, not waiting.
        assert not any(on_disk)
        assert not (tmp_path / FOLDER).exists()
    for one, other in zip(*results, strict=True):
        assert equal(one, other)


def test_what_waits_is_in_files_and_reads_back(tmp_path):
    store = DiskStore(tmp_path / "proxies")
    tensors = {"weights/w": torch.randn(3, 4).T, f"{MOMENTS}w/step": torch.tensor(3.0)}
    store[2], store[0] = tensors, {}
    assert {path.name for path in store.folder.iterdir()} == {"0.safetensors", "2.safetensors"}
    assert equal(store[2], tensors)
    assert (store[0], sorted(store), len(store)) == ({}, [0, 2], 2)
    assert 1 not in store
    mapped = store[2]
    mapped["weights/w"].zero_()
    assert equal(store[2], tensors), "written through to the file"
    mapped, store[2] = store[2], {"other": torch.ones(1)}
    assert equal(mapped, tensors), "another file took the place of a mapped one"
    assert equal(store.pop(2), {"other": torch.ones(1)})
    assert sorted(store) == [0]


def test_own_files_go_away_at_the_end(tmp_path):
    """Process 1 of 2 has the odd shards."""
    with open_store("disk", tmp_path, 1, 2) as mine, open_store("disk", tmp_path, 0, 2) as other:
        mine[1], mine[3], other[0] = {}, {}, {}
    assert not (tmp_path / FOLDER).exists()
    other[2] = {}
    mine[1] = {}
    with contextlib.suppress(UserError), open_store("disk", tmp_path, 1, 2):
        raise UserError("something")
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["2.safetensors"]


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left"), OSError(28, "No space left")]
)
def test_a_full_disk_is_one_clear_line(error, monkeypatch, tmp_path):
    def full(*_):
        raise error

    monkeypatch.setattr(stores, "save_file", full)
    with pytest.raises(UserError, match=r"--proxy_store disk: .*No space left.*1\.00 GiB.*latest"):
        DiskStore(tmp_path)[0] = {"weights/w": torch.empty(2**28)}


RESIDENT = """
import sys, torch
from iet_sd.engine.store import DiskStore, open_store
from pathlib import Path

def resident():
    fields = [line.split() for line in open("/proc/self/status")]
    return next(int(field[1]) for field in fields if field[0] == "VmRSS:") // 1024

with open_store(sys.argv[1], Path(sys.argv[2]), 0, 1) as store:
    before = resident()
    for shard in range(8):
        # 40 MiB: so large that the allocator gives it back when it is freed.
        store[shard] = {"w": torch.ones(10 * 2**20)}
        if shard:
            store[shard - 1] = {"w": store.pop(shard - 1)["w"].add_(1)}
    print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("kind", "few"), [("memory", False), ("disk", True)])
def test_what_waits_on_disk_takes_no_memory(kind, few, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, kind, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) < 160) == few, done.stdout
