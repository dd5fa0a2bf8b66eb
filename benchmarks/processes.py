"""What do two processes gain over one, and what do they send?

    python -m benchmarks.processes

The demo on 4 shards, on two processes of one thread each and on one process of one thread, taken in
turns (A B A B): seconds of all rounds, from the first step to the last average, without start and
end. And the bytes that each process gives to collectives in a round, counted where torch sends
them, beside what it would give if as many batches were trained with gradients shared at every step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODES = {"full": {}, "LoRA": {"train_mode": "lora", "rank": 16}}


def train_and_count(sent: str, argv: list[str]) -> int:
    """``train_iet_sd.py`` in this process, and its bytes and updates into the file ``sent``."""
    import torch.distributed as dist
    import torch.distributed.distributed_c10d as c10d

    from iet_sd.cli.train import train

    total = 0

    def counting(collective, given):
        def call(*args, **kwargs):
            nonlocal total
            total += args[given].nbytes
            return collective(*args, **kwargs)

        return call

    # Sums of weights and skips, and gathered events.
    dist.all_reduce = counting(dist.all_reduce, 0)
    c10d.all_gather = counting(c10d.all_gather, 1)
    status = train(argv)
    if os.environ.get("RANK", "0") == "0":
        Path(sent).write_text(json.dumps(total))
    return status


def run(processes: int, given: dict[str, object]) -> tuple[list[dict], int]:
    """The rounds of a run, by metrics.jsonl, and the bytes that process 0 has sent."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        launch += ["--num_processes", str(processes), "--main_process_port", "0"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "config": ROOT / "configs" / "demo.yaml",
            "pretrained_model_name_or_path": ROOT / "demo" / "model",
            "train_data_dir": ROOT / "demo" / "data",
            "output_dir": f"{folder}/output",
            "cache_dir": f"{folder}/cache",
            "checkpointing_rounds": 0,
            "validation_prompts": "a face",
            "validation_inference_steps": 1,
            "num_validation_images": 1,
            "report_to": "none",
            **given,
        }
        argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        done = subprocess.run(
            [*launch, __file__, "--worker", f"{folder}/sent", *argv],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        lines = (Path(folder) / "output" / "metrics.jsonl").read_text().splitlines()
        rounds = [line for line in map(json.loads, lines) if line["kind"] == "round"]
        return rounds, json.loads((Path(folder) / "sent").read_text())


def main() -> None:
    """Measure and print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    given = {"num_rounds": args.rounds, "steps_per_round": args.steps}
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.repeats):
        for processes, times in seconds.items():
            rounds, _ = run(processes, given)
            times.append(sum(line["seconds"] for line in rounds))
    print("| processes | seconds of each run | mean |\n|---|---|---|")
    for processes, times in seconds.items():
        each = ", ".join(f"{time:.1f}" for time in times)
        print(f"| {processes} | {each} | {statistics.mean(times):.1f} |")
    one, two = (statistics.mean(times) for times in seconds.values())
    print(f"\nTwo processes take {two / one:.2f} of the time of one.\n")
    print("| trained | sent per round | shared gradients would be | ratio |\n|---|---|---|---|")
    for mode, more in MODES.items():
        rounds, total = run(2, {**given, **more})
        trained = parameters_of(more)
        sent = total / len(rounds)
        # Batches of a round over two processes, each of which would send its gradient.
        gradients = 4 * trained * sum(line["updates"] for line in rounds) / len(rounds) / 2
        print(
            f"| {mode}, {trained / 1e6:.2f} M | {sent / 2**20:.2f} MiB "
            f"| {gradients / 2**20:.1f} MiB | 1 : {gradients / sent:.1f} |"
        )


def parameters_of(given: dict[str, object]) -> int:
    """Trained parameters of the demo."""
    from iet_sd.arguments import from_layers, read_yaml
    from iet_sd.config import Config
    from iet_sd.engine.plan import estimate

    file = read_yaml(ROOT / "configs" / "demo.yaml", Config, "demo")
    place = {"pretrained_model_name_or_path": str(ROOT / "demo" / "model")}
    return estimate(from_layers(file, place, given), 1, 1).trainable


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(train_and_count(sys.argv[2], sys.argv[3:]))
    main()
