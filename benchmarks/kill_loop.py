"""Kills a run again and again, and compares what it comes to with a run that nobody touched: bit for bit.

    python benchmarks/kill_loop.py --kills 200

For each layout (one process, two ranks, two pipeline stages, two stages x two ranks) one undisturbed run,
then one whose processes all get SIGKILL at random moments, while they start, train and save, until the kills
are used up; then it is left to finish. Every step is saved, in the background in every second life. Rows of
metrics.jsonl, the tokens' ledger and the checksums of the last checkpoint's tensors have to be equal.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from result_files import new_parser, parse_args

from tests.helpers.kill_loop import LAYOUTS, KillLoop


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--kills", type=int, default=200, help="in all, spread over the layouts")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", choices=tuple(LAYOUTS), default=list(LAYOUTS))
    arguments = parse_args(parser)
    with tempfile.TemporaryDirectory() as folder:
        loop = KillLoop(Path(folder), arguments.steps, arguments.seed)
        for place, name in enumerate(arguments.layouts):
            own = arguments.kills // len(arguments.layouts) + (
                place < arguments.kills % len(arguments.layouts)
            )
            begin, before = time.perf_counter(), loop.in_saves
            loop.run(name, own)
            seconds = time.perf_counter() - begin
            print(
                f"{name}: {own} kills, {loop.in_saves - before} of them in a save: bit for bit the same"
                f" ({seconds:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
