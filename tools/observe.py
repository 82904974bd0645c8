"""Record runs that are looked at on the way: `python tools/observe.py params/bound/lite.yaml`

Runs the queue, in order, and records each run in a folder of its own (default: build/results/<look>/<name>).
What is looked at: `bound`, the terms of the convergence bound, or `merging`, how local models merge. What is there
already costs nothing; an interrupted run goes on from its last checkpoint. One line per run on stdout.
Exit code: 0 done, 1 a run failed, 2 bad input, 130 interrupted.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from feddip_lite.core.errors import guarded
from feddip_lite.records.profiles import load_profile
from feddip_lite.studies import merging
from feddip_lite.studies.bound import path
from feddip_lite.studies.trajectory import record_all


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queue", type=Path, help="a file such as params/bound/lite.yaml")
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: build/results/<look>/<name of the queue>")
    parser.add_argument("--look", choices=("bound", "merging"), default="bound", help="at what; default: bound")
    parser.add_argument("--workers", metavar="N", type=int, help="clients side by side; default: one per core")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_args(arguments)
    folder = given.results or Path("build/results") / given.look / given.queue.stem
    how = {"bound": partial(path.record_path, progress=not given.quiet), "merging": merging.record_merging}[given.look]

    def work() -> int:
        queue = load_profile(given.queue)
        if given.workers is not None:
            queue = [replace(config, workers=given.workers) for config in queue]
        record_all(queue, folder, how)
        return 0

    status, line = guarded(work)
    if line:
        print(f"tools/observe.py: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
