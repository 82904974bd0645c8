"""Run the notebooks in number order and write one HTML report: `python tools/reproduce.py --profile quick`.

Each notebook runs with papermill in a kernel of its own, in its own folder (as in Jupyter), with PROFILE set, two at a
time: one starts and draws while another trains; what two of them train, one trains, and the other waits for. Executed
copies and the report lie in build/<profile>/. A notebook that fails (a cell, the kernel, the time limit) ends the run
with its name and the error, and none is started after it; its copy is kept, with what it got to. The exit code is then
1, and 2 for a call that makes no sense.
"""

import argparse
import ast
import contextlib
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
import papermill
import psutil
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import CellTimeoutError

from feddip_lite.records.catalogue import PROFILES

sys.path.insert(0, str(Path(__file__).parent))
from report import write_report

ROOT = Path(__file__).resolve().parents[1]
QUICK_CELL_SECONDS = 300  # as in `make test`; the longer profiles train for hours in one cell and have no limit


def select(folder: Path, only: list[str]) -> list[Path]:
    """The numbered notebooks of `folder` in number order; `only` holds names or beginnings of names, such as "12"."""
    found = sorted(folder.resolve().glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise ValueError(f"no notebook named NN_name.ipynb in {folder}")
    for name in only:
        if not any(path.name.startswith(name) for path in found):
            raise ValueError(f"--only: {name!r} is not one of {', '.join(path.stem for path in found)}")
    return [path for path in found if not only or any(path.name.startswith(name) for name in only)]


def check_parameters(path: Path, parameters: dict) -> None:
    """Refuse a parameter that the notebook's tagged cell does not hold (papermill itself would only log it)."""
    tagged = [c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
    nodes = [node for cell in tagged for node in ast.walk(ast.parse(cell.source))]
    known = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    for name in parameters:
        if name not in known:
            raise ValueError(f"{path.stem}: no parameter {name!r}, its tagged cell has {', '.join(known) or 'none'}")


def execute(path: Path, copy: Path, parameters: dict, cell_seconds: int | None) -> str | None:
    """Run one notebook in the current folder, keep the executed copy, and return None or the error in one line."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    for last_try in (False, True):
        try:
            papermill.execute_notebook(
                str(path),
                str(copy),
                parameters=parameters,
                kernel_name="python3",  # the running interpreter, whatever the notebook's metadata says
                language="python",
                progress_bar=False,
                execution_timeout=cell_seconds,
                extra_arguments=["--log-level=CRITICAL"],  # else each kernel warns at its start of unencrypted TCP
            )
        except papermill.PapermillExecutionError as error:
            return one_line(f"cell [{error.exec_count}]: {error.ename}: {error.evalue}")
        except CellTimeoutError:
            return f"a cell took longer than {cell_seconds} s"
        except Exception as error:  # dead kernel, time-out, no kernel, unreadable notebook: the user needs one line
            # Ports for a kernel are chosen, closed and used later; a program in between may have taken one.
            clash = "Address already in use" in str(error) or "died before replying" in str(error)
            if last_try or not clash:
                return one_line(f"{type(error).__name__}: {error}")
        else:
            return None


def one_line(text: str) -> str:
    """The text without line breaks, at most 300 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."


def seconds_of(copy: Path) -> float | None:
    """How long the kept copy of a notebook took, or None if it never ended."""
    try:
        return nbformat.read(copy, as_version=4).metadata.papermill.duration
    except (OSError, AttributeError, ValueError):
        return None


def run_all(notebooks: list[Path], out: Path, profile: str, cell_seconds: int | None, jobs: int) -> dict[str, str]:
    """Run the notebooks of one folder, `jobs` at a time, a line for each that ended; returns names and errors of those
    that failed. After a failure none is started; what is running ends."""
    out = out.resolve()
    expected = {path.stem: seconds_of(out / path.name) for path in notebooks}  # from an earlier run, if there was one
    for path in notebooks:  # what an earlier run left must not pass for this one's
        for kind in (".ipynb", ".html"):
            (out / path.name).with_suffix(kind).unlink(missing_ok=True)
    errors, took = {}, {}

    def run(path: Path) -> tuple[str, float] | None:
        if errors:
            return None
        start = time.perf_counter()
        with contextlib.closing(ensure_event_loop()):  # papermill's in this thread, which nobody else would close
            if error := execute(path, out / path.name, {"PROFILE": profile}, cell_seconds):
                errors[path.stem] = error
        return path.stem, time.perf_counter() - start

    pool = ThreadPoolExecutor(jobs)
    try:
        with contextlib.chdir(notebooks[0].parent):  # not papermill's cwd: threads share one
            for future in as_completed([pool.submit(run, path) for path in notebooks]):
                if done := future.result():
                    name, took[name] = done
                    mean = sum(took.values()) / len(took)
                    left = sum(expected[path.stem] or mean for path in notebooks if path.stem not in took) / jobs
                    more = f", about {left:.0f} s left" if left and not errors else ""
                    print(f"[{len(took)}/{len(notebooks)}] {name} {took[name]:.1f} s{more}", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return dict(sorted(errors.items()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks and write one HTML report.")
    parser.add_argument("--profile", default="quick", choices=PROFILES)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="names or their beginnings, such as 12")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="notebooks at a time; default: 2")
    parser.add_argument("--timeout", type=int, metavar="SECONDS", help="limit for one cell, 0 = none (quick: 300)")
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks", metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: build/<profile>")
    options = parser.parse_args(arguments)
    out = options.out or ROOT / "build" / options.profile
    if options.jobs < 1:
        parser.error(f"--jobs: {options.jobs} is not valid; expected 1 or more")
    limit = options.timeout if options.timeout is not None else QUICK_CELL_SECONDS * (options.profile == "quick")
    logging.getLogger("papermill").setLevel(logging.ERROR)
    os.environ.pop("MPLBACKEND", None)  # "Agg" would reach the kernels and keep every figure out of the report
    try:
        notebooks = select(options.notebooks, options.only)
        for path in notebooks:
            check_parameters(path, {"PROFILE": options.profile})
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        errors = run_all(notebooks, out, options.profile, limit or None, options.jobs)
    except KeyboardInterrupt:
        print(f"\nstopped; what was executed lies in {out}", file=sys.stderr, flush=True)
        for kernel in psutil.Process().children(recursive=True):
            kernel.kill()
        os._exit(130)  # at once: the threads would still look after their kernels, or start them again
    index = write_report(out, options.notebooks, options.profile, errors)
    for name, error in errors.items():
        print(f"stopped: {name} failed: {error}", file=sys.stderr)
    print(f"report: {index}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
