"""Does the memory of the nearest-neighbour search stay bounded, and what does a query cost?

    python -m benchmarks.neighbours

For bases of 10,000 to 1,000,000 random rows in one memory-mapped file (deleted at the end), a fresh
process searches 4,000 queries: its peak resident memory, and the time per query. Beside it, in the
same run, the time per query of one full matrix product with numpy, the base in memory and
normalised, for as many of the queries as a matrix of 1 GiB can hold.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from iet_sd.evaluation.neighbours import nearest

SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
DIMS, QUERIES = 512, 4_000
MATRIX_BYTES = 2**30


def features(seed: int, count: int) -> np.ndarray:
    """Rows of normal numbers."""
    return np.random.default_rng(seed).standard_normal((count, DIMS), dtype=np.float32)


def search(base_ND: np.ndarray, k: int) -> float:
    """Seconds per query of `nearest`."""
    queries_QD = features(0, QUERIES)
    start = time.perf_counter()
    nearest(queries_QD, base_ND, k)
    return (time.perf_counter() - start) / QUERIES


def full_matrix(base_ND: np.ndarray, k: int) -> float:
    """Seconds per query of a matrix of all similarities, and of taking the best from it."""
    base_ND = base_ND / np.linalg.norm(base_ND, axis=1, keepdims=True)
    queries_QD = features(0, QUERIES)[: MATRIX_BYTES // (4 * len(base_ND))]
    start = time.perf_counter()
    similarity_QN = queries_QD @ base_ND.T
    if k == 1:
        similarity_QN.argmax(axis=1)
    else:
        similarity_QN.argpartition(-k, axis=1)
    return (time.perf_counter() - start) / len(queries_QD)


def in_a_process(function: str, path: Path, rows: int, k: int) -> tuple[float, float]:
    """Seconds per query, and the peak resident memory in bytes."""
    command = [sys.executable, "-m", "benchmarks.neighbours", "--k", str(k)]
    done = subprocess.run(
        [*command, "--measure", function, str(path), str(rows)], check=True, capture_output=True
    )
    return tuple(json.loads(done.stdout))


def measure(function: str, path: str, rows: str, k: int) -> None:
    """What runs in that process: prints both numbers."""
    base_ND = np.memmap(path, dtype=np.float32, mode="r", shape=(int(rows), DIMS))
    seconds = {"search": search, "full_matrix": full_matrix}[function](base_ND, k)
    # In KiB, of the process so far; on macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit]))


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(*args.measure, args.k)
    print("| N_train | peak memory | time per query | time per query, full matrix | full matrix |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.f32"
        for rows in args.sizes:
            with path.open("wb") as file:
                for start in range(0, rows, 10_000):
                    file.write(features(1 + start, min(10_000, rows - start)).tobytes())
            seconds, peak = in_a_process("search", path, rows, args.k)
            full_seconds, _ = in_a_process("full_matrix", path, rows, args.k)
            print(
                f"| {rows:,} | {peak / 2**20:.0f} MiB | {seconds * 1e3:.2f} ms "
                f"| {full_seconds * 1e3:.2f} ms | {QUERIES * rows * 4 / 2**30:.1f} GiB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
