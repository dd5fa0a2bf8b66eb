"""Runs in processes of their own, on a CPU, all with the same environment."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from benchmarks.throughput.arithmetic import Counts, Run
from benchmarks.throughput.rows import ROOT, Row, Setting, argv_of, script_of

_IMPORTS = "import torch; from diffusers import StableDiffusionPipeline"
# A process begins with the peak memory of the one that starts it, which should be small.
_LAUNCHER = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
status = subprocess.call(sys.argv[2:])
seconds = time.perf_counter() - began
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump([seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss], file)
sys.exit(status != 0)
"""
_MATRIX = """
import time, torch
a = torch.randn(1024, 1024)
def once():
    began = time.perf_counter()
    a @ a
    return time.perf_counter() - began
print(2 * 1024**3 / min(once() for _ in range(50)))
"""


@dataclass(frozen=True)
class Bench:
    """Where runs find their scripts and keep their files."""

    work: Path
    threads: int = 1
    peers: Path | None = None
    log: Path | None = None
    """A file that gets a line of JSON a run at once, so that none is lost with a later one."""

    def cache(self, key: str) -> Path:
        """A row's own, shared by its runs."""
        return self.work / "cache" / key

    def run(self, key: str, row: Row, setting: Setting, rounds: int) -> Run:
        """Train; what it did comes from metrics.jsonl. Errors: `SystemExit` if it fails."""
        script = script_of(row, setting.train_mode, self.peers)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            output = Path(folder) / "output"
            argv = argv_of(row, setting, rounds, output, self.cache(key))
            spent = self._time(f"row {key}", [str(script), *argv])
            if row.peer:
                done = Run(*spent, plain_counts(setting.updates(rounds), setting.batch))
            else:
                done = Run(*spent, *read_rounds(output / "metrics.jsonl"))
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps({"row": key, "rounds": rounds, **asdict(done)}) + "\n")
        return done

    def imports(self) -> float:
        """Seconds of a process that imports torch and diffusers' pipeline, and no more."""
        return self._time("importing diffusers", ["-c", _IMPORTS])[0]

    def matrix_speed(self) -> float:
        """FLOP per second of a large matrix product in fp32, the best of many."""
        done = subprocess.run(
            [sys.executable, "-c", _MATRIX], env=self._env(), check=True, capture_output=True
        )
        return float(done.stdout)

    def _time(self, name: str, arguments: list[str]) -> tuple[float, float, int]:
        """Wall time, time of all threads, and peak memory of a Python process."""
        with tempfile.TemporaryFile("w+") as output, tempfile.NamedTemporaryFile("r+") as found:
            launcher = subprocess.Popen(
                [sys.executable, "-S", "-c", _LAUNCHER, found.name, sys.executable, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env(),
                cwd=self.work,
                start_new_session=True,
            )
            try:
                status = launcher.wait()
            except BaseException:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
                raise
            if status:
                output.seek(0)
                raise SystemExit(f"{name} failed:\n{output.read()[-4000:]}")
            seconds, cpu, peak = json.load(found)
        # In KiB; on macOS in bytes.
        return seconds, cpu, peak * (1 if sys.platform == "darwin" else 1024)

    def _env(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
        return {
            **inherited,
            "OMP_NUM_THREADS": str(self.threads),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        }


def plain_counts(updates: int, batch: int) -> Counts:
    """What a script does that trains each sample once, on what it has encoded for that."""
    names = ("scored", "trained", "forward", "backward", "encoded")
    return replace(Counts(updates=updates), **dict.fromkeys(names, updates * batch))


def read_rounds(path: Path) -> tuple[Counts, float]:
    """The sum of the rounds in a metrics.jsonl, and their seconds."""
    lines = map(json.loads, path.read_text().splitlines())
    rounds = [line for line in lines if line["kind"] == "round"]
    names = [f.name for f in fields(Counts)]
    counts = (Counts(**{name: line[name] for name in names}) for line in rounds)
    return sum(counts, Counts()), sum(line["seconds"] for line in rounds)
