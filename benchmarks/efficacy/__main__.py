"""``python -m benchmarks.efficacy run`` and ``report``; see `benchmarks.efficacy`."""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.efficacy.protocol import RESULTS, Protocol
from benchmarks.efficacy.study import STUDIES


def main() -> int:
    """Parse and do; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.efficacy", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the cells that are missing")
    run.add_argument("--study", choices=STUDIES, default="first")
    run.add_argument("--workers", type=int, default=1, help="cells at a time, one core each")
    run.add_argument("--minutes", type=float, help="then stop; the same command goes on later")
    run.add_argument(
        "--work_dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "iet_sd-efficacy",
        help="data, caches and checkpoints of cells under way; keep it to go on within a cell",
    )
    run.add_argument("--results", type=Path, default=RESULTS, help="one parquet file a cell")
    run.add_argument("--list", action="store_true", help="list the missing cells, and stop")
    report = commands.add_parser("report", help="write RESULTS.md and its pictures")
    report.add_argument("--results", type=Path, default=RESULTS)
    report.add_argument("--output", type=Path, default=RESULTS.parent)
    args = parser.parse_args()
    if args.command == "report":
        from benchmarks.efficacy.report import write

        write(args.results, args.output, Protocol())
        return 0
    from benchmarks.efficacy import runner

    work_dir, results = args.work_dir.absolute(), args.results.absolute()
    if args.list:
        print(*(cell.name for cell in runner.missing(args.study, Protocol(), results)), sep="\n")
        return 0
    # As Ctrl-C, so that the cells under way are told too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return runner.run(args.study, Protocol(), work_dir, results, args.workers, args.minutes)


if __name__ == "__main__":
    sys.exit(main())
