"""Headless use: `python -m feddip_lite run | sweep | methods | export | doctor`. Bad input: one line and status 2."""

import argparse
import signal
import sys
import time
import warnings
from dataclasses import fields
from pathlib import Path

import yaml

from . import doctor
from .config import Config
from .core.errors import FAILED, ClientFailure, Diverged, Held, Note, OutOfTime, guarded, is_divergence
from .core.settings import integer, read_value, real, refuse_unknown
from .methods.registry import METHODS, options_in_words, options_of, options_of_all
from .plugins import load_plugins
from .records.plain_model import export_model
from .records.profiles import load_profile
from .records.store import ROOT, read_run
from .train.observe import Observer, ProgressLine, progress_bar
from .train.recording import Recording
from .train.run import execute, run

TERMINATED = 143


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest known word; flags are written out."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise ValueError(message)

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            options = {name for method in METHODS for name in options_of(method)}
            if (option := flag.removeprefix("--").replace("-", "_")) in options:
                raise ValueError(f"command line: {flag} belongs to a method; expected --method-options {option}=VALUE")
            flags = [
                name for name in self.commands[known.command]._option_string_actions if name not in ("-h", "--help")
            ]
            refuse_unknown([flag], flags, "command line")
        return known


def parser() -> Parser:
    """The command line: a kebab-case flag for every field of `Config`."""
    top = Parser(prog="python -m feddip_lite", description="Federated pruning: FedDIP and its relatives.")
    commands = top.add_subparsers(dest="command", required=True, metavar="run | sweep | methods | export | doctor")
    one = commands.add_parser("run", help="one run, recorded; a run that is there already costs nothing")
    for item in fields(Config):
        default = "{}" if item.name == "method_options" else str(item.default).lower()
        one.add_argument(
            "--" + item.name.replace("_", "-"), dest=item.name, metavar="VALUE", default=argparse.SUPPRESS,
            help=f"{item.metadata['doc']}: {item.metadata['check'].expected} (default {default})".replace("%", "%%"),
        )  # fmt: skip
    one.add_argument(
        "--on", default="here", metavar="ENGINE",
        help="where clients are: here, or on Flower (simulation, deployment), with the extra feddip-lite[flower]",
    )  # fmt: skip
    many = commands.add_parser("sweep", help="a queue of runs, params/*.yaml; resumable")
    many.add_argument("profile", help="a file such as params/lite.yaml")
    many.add_argument("--time-limit", metavar="SECONDS", help="stop after this time, keeping what was done")
    for command in (one, many):
        command.add_argument("--results", metavar="DIR", default="build/results", help="default: %(default)s")
        command.add_argument("--checkpoint-every", metavar="ROUNDS", help="default: at most one every 30 s")
        command.add_argument(
            "--tensorboard", metavar="DIR", help="write the rows there, too (feddip-lite[tensorboard])"
        )
        command.add_argument("--quiet", action="store_true", help="no progress")
    listed = commands.add_parser("methods", help="every method, or the options of one: defaults, ranges, sources")
    listed.add_argument("name", nargs="?", help="such as feddip")
    out = commands.add_parser("export", help="a recorded run's sparse model, for use without this package")
    out.add_argument("run", help="its id, as in the names of its files")
    out.add_argument("--results", metavar="DIR", default="build/results", help="default: %(default)s")
    out.add_argument("--to", metavar="FILE", required=True, help="ends in .onnx, .pt2 (torch.export) or .safetensors")
    check = commands.add_parser("doctor", help="versions, devices, data sets, disk: what works here")
    for command in (one, many, listed, out):
        command.add_argument(
            "--plugin", metavar="MODULE", action="append", default=[],
            help="imported first: it registers models, data or methods of your own",
        )  # fmt: skip
    top.commands = {"run": one, "sweep": many, "methods": listed, "export": out, "doctor": check}
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 (a run failed, doctor found faults), 2 (bad input), 130."""
    with warnings.catch_warnings():
        warnings.showwarning = _in_one_line
        warnings.simplefilter("default", Note)  # once each
        status, line = guarded(lambda: _command(arguments))
    if line:
        print(f"python -m feddip_lite: {line}", file=sys.stderr)
    return status


def _in_one_line(message, category, *where) -> None:
    print(
        f"python -m feddip_lite: {'note' if issubclass(category, Note) else category.__name__}: {message}",
        file=sys.stderr,
    )


def _command(arguments: list[str] | None) -> int:
    given = parser().parse_args(arguments)
    if given.command == "doctor":
        return doctor.main()
    load_plugins(given.plugin)
    if given.command == "methods":
        path = ROOT / "params" / "methods.yaml"  # in a checkout
        sources = yaml.safe_load(path.read_text()) if path.exists() else {}
        print("\n".join(options_of_all() if given.name is None else options_in_words(given.name, sources)))
        return 0
    if getattr(given, "quiet", False):
        warnings.simplefilter("ignore", Note)
    given.results = str(Path(given.results).expanduser())
    if given.command == "export":
        print(f"{given.to}: {export_model(given.results, given.run, given.to)} bytes")
        return 0
    every = given.checkpoint_every
    if every is not None:
        every = integer(1).require("--checkpoint-every", read_value(every))
    return _run(given, every) if given.command == "run" else _sweep(given, every)


def _run(given: argparse.Namespace, every: int | None) -> int:
    values = {item.name: read_value(getattr(given, item.name)) for item in fields(Config) if hasattr(given, item.name)}
    if isinstance(text := values.get("method_options"), str) and "=" in text:  # mu=0.01,variant=homo
        pairs = (pair.partition("=") for pair in text.split(","))
        values["method_options"] = {name.strip(): read_value(value.strip()) for name, _, value in pairs}
    config = Config.from_dict(values)
    if given.on != "here":
        from .flower.processes import launch  # only here, so that a run in one process knows nothing of Flower

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that `launch` ends what it has started
        launch(config, given.results, given.on, checkpoint_every=every or 1)
    more = {"checkpoint_every": every, "progress": not given.quiet, "observers": _watching(given)}
    history = run(config, results_dir=given.results, **more)
    print(
        f"{given.results}/{config.run_id}.csv: accuracy {history['accuracy'].iloc[-1]:.4f} after {config.rounds} rounds"
    )
    return 0


def _watching(given: argparse.Namespace) -> list[Observer]:
    if given.tensorboard is None:
        return []
    from .report.live import TensorBoard  # with all that draws, only where it is asked for

    return [TensorBoard(given.tensorboard)]


def _sweep(given: argparse.Namespace, every: int | None) -> int:
    deadline = float("inf")
    if given.time_limit is not None:
        deadline = time.monotonic() + real("(0, inf)").require("--time-limit", read_value(given.time_limit))
    configs = load_profile(given.profile)
    stored = [read_run(given.results, config.run_id) is not None for config in configs]
    done = sum(config.rounds for config, is_there in zip(configs, stored, strict=True) if is_there)
    total = sum(config.rounds for config in configs)
    recording, diverged = Recording(Path(given.results)), 0
    with progress_bar(total, f"{sum(stored)}/{len(configs)} runs", initial=done, show=not given.quiet) as bar:
        for number, (config, is_there) in enumerate(zip(configs, stored, strict=True), 1):
            bar.set_description_str(f"run {number}/{len(configs)} {config.run_id}")
            try:
                if time.monotonic() > deadline and not is_there:
                    raise OutOfTime(f"{config.run_id}: not started")
                watching = [ProgressLine(bar), *_watching(given)]
                history = execute(config, recording, watching, checkpoint_every=every, deadline=deadline, wait=False)
                said = f"{config.run_id}: accuracy {history['accuracy'].iloc[-1]:.4f}"
            except OutOfTime as stop:
                left = len(configs) - number + 1
                bar.write(f"time limit reached; {left} of {len(configs)} runs left. {stop}", file=sys.stdout)
                break
            except Held as held:
                said = f"{held}; skipped"
            except (ClientFailure, Diverged) as error:
                if not is_divergence(error):
                    raise
                diverged += 1
                said = f"{config.run_id}: diverged: {error}"
            bar.write(f"[{number}/{len(configs)}] {said}", file=sys.stdout)
    if diverged:
        print(f"{diverged} of {len(configs)} runs diverged")
    return FAILED if diverged else 0


if __name__ == "__main__":
    sys.exit(main())
