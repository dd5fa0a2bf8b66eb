"""``python -m benchmarks.throughput compare``, ``scaling`` and ``profile``; see the package."""

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path

from benchmarks.throughput import rows

_RESULTS = rows.ROOT / "output" / "throughput"


def parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--train_mode", choices=rows.PEERS, default="full")
    shared.add_argument("--train_batch_size", type=int, default=8)
    shared.add_argument("--num_shards", type=int, default=4, help="of rows with proxies (K)")
    shared.add_argument("--resolution", type=int, default=rows.RESOLUTION)
    shared.add_argument("--images", type=int, default=64)
    shared.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of every run")
    shared.add_argument(
        "--ours", default="", metavar="FLAGS", help='more for all rows of ours: "--torch_compile"'
    )
    shared.add_argument("--output", type=Path, default=_RESULTS, help="for the text and a JSON")

    def command(name: str, text: str, steps: int) -> argparse.ArgumentParser:
        help = "of each proxy in a round; without proxies K times as many (default: %(default)s)"
        added = commands.add_parser(name, help=text, description=text, parents=[shared])
        added.add_argument("--steps", type=int, default=steps, help=help)
        return added

    def lengths(command: argparse.ArgumentParser, default: tuple[int, int], repeats: int) -> None:
        help = "lengths of the two runs that a rate is made of; both even (default: %(default)s)"
        command.add_argument("--rounds", type=int, nargs=2, default=default, help=help)
        command.add_argument("--repeats", type=int, default=repeats)

    def choice(command: argparse.ArgumentParser, default: tuple[str, ...]) -> None:
        listed = "; ".join(f"{key}: {row.title}" for key, row in rows.ROWS.items())
        help = f"{listed} (default: {' '.join(default)})"
        command.add_argument("--rows", nargs="+", choices=rows.ROWS, default=default, help=help)
        command.add_argument(
            "--diffusers_scripts",
            type=Path,
            metavar="FOLDER",
            help="examples/text_to_image of a clone of diffusers, for row a",
        )

    compare = command("compare", "diffusers' own scripts and ours, in turns", 8)
    lengths(compare, (2, 6), repeats=3)
    choice(compare, rows.COMPARED)
    scaling = command("scaling", "how cost grows with images, shards and resolution", 4)
    scaling.add_argument("--factors", type=int, nargs="+", default=(1, 2, 4))
    lengths(scaling, (2, 4), repeats=1)
    profile = command("profile", "shares of a step, by part", 8)
    profile.add_argument("--rounds", type=int, default=4, help="clocked (default: %(default)s)")
    profile.add_argument("--warm_up", type=int, default=2, help="rounds before these")
    choice(profile, rows.PROFILED)
    return made


def main() -> int:
    """Parse, check, and do; returns the exit status."""
    made = parser()
    args = made.parse_args()
    check(made, args)
    # Read when torch is loaded, which is below.
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        measure(args, Path(folder))
    return 0


def check(made: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message if the flags cannot be measured."""
    if args.images % args.train_batch_size:
        made.error(
            f"--images must be a multiple of --train_batch_size {args.train_batch_size}, so that "
            f"every batch is full; got {args.images}."
        )
    if args.command != "profile":
        short, long = args.rounds
        if short % 2 or long % 2 or not 0 < short < long:
            made.error(
                "--rounds: two even numbers, the second larger, as proxies are averaged in every "
                f"other round; got {short} {long}."
            )
    if args.command != "scaling":
        try:
            for key in args.rows:
                rows.script_of(rows.ROWS[key], args.train_mode, args.diffusers_scripts)
        except FileNotFoundError as error:
            made.error(str(error))


def measure(args: argparse.Namespace, work: Path) -> None:
    """Build model and images in ``work``, measure, print, and save."""
    from benchmarks.throughput.compare import compare, write
    from benchmarks.throughput.measure import Bench
    from benchmarks.throughput.pipeline import build_images, build_pipeline

    peers = getattr(args, "diffusers_scripts", None)
    name = f"{args.command}-{args.train_mode}"
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output.absolute() / f"{name}-runs.jsonl"
    bench = Bench(work, args.threads, peers and peers.absolute(), log)
    setting = rows.Setting(
        model=build_pipeline(work / "model"),
        data=build_images(work / "data", args.images, args.resolution),
        resolution=args.resolution,
        batch=args.train_batch_size,
        train_mode=args.train_mode,
        num_shards=args.num_shards,
        steps=args.steps,
        ours=tuple(shlex.split(args.ours)),
    )
    if args.command == "compare":
        found = compare(bench, setting, args.rows, tuple(args.rounds), args.repeats)
    elif args.command == "scaling":
        from benchmarks.throughput.scaling import scaling

        rounds, repeats = tuple(args.rounds), args.repeats
        found = scaling(bench, setting, args.images, args.factors, rounds, repeats)
    else:
        from benchmarks.throughput.parts import profiles

        found = profiles(setting, args.rows, args.warm_up, args.rounds, work, bench.peers)
    write(args.output, name, *found)


if __name__ == "__main__":
    sys.exit(main())
