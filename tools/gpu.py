"""All that a GPU rented by the minute is asked for, in one command: `python3 tools/gpu.py --minutes 8 --out OUT`

In this order, each step bounded, and what it found written at once: versions and device; the tests marked `cuda`; how
far each model, arithmetic and precision is from float64 on the CPU, and three rounds from the CPU's; seconds per round
of each way to train a round's clients; seconds per round of the queue, and beside other programs; then the queue of
params/paper.yaml without what results/paper holds, in order of value, as long as a run is predicted to end in time. OUT
has `report.json`, `tests.txt` and `results.tar`: the records of finished runs, and the checkpoint of one that was
stopped, if it fits. The next slice, given that results.tar (`--resume`), goes on. `--steps` does only some of it,
`--processes` the queue by several programs. Without NVIDIA's MPS a GPU serves these in turn, and six of them gained
nothing; what they gain under it is not measured yet (benchmarks/NOTES.md).

Needs this checkout, torch and pytest; no installation, no network. Where data has to arrive in small pieces:
`--split NAME` writes pieces of a data set, `--join FOLDER` makes it whole again.

Exit code: 0 all steps were done, 1 one failed (the others are done all the same), 2 bad input.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from feddip_lite.config import Config  # noqa: E402
from feddip_lite.core.autograd import Autograd  # noqa: E402
from feddip_lite.core.errors import ClientFailure, Diverged, OutOfTime, guarded  # noqa: E402
from feddip_lite.core.flat import FlatModel, Layout  # noqa: E402
from feddip_lite.core.models import INPUT_SHAPES, Dropout, build_model  # noqa: E402
from feddip_lite.core.settings import integer, real  # noqa: E402
from feddip_lite.data.datasets import DATASETS, Dataset, dataset_of  # noqa: E402
from feddip_lite.data.files import KEYS, files_here, files_of  # noqa: E402
from feddip_lite.records.profiles import load_profile  # noqa: E402
from feddip_lite.records.provenance import COMMIT, provenance  # noqa: E402
from feddip_lite.records.store import atomic_write, plain  # noqa: E402
from feddip_lite.train.evaluate import evaluate_state  # noqa: E402
from feddip_lite.train.recording import Recording  # noqa: E402
from feddip_lite.train.round import run_round  # noqa: E402
from feddip_lite.train.run import execute, running  # noqa: E402
from feddip_lite.train.setup import kernels_of, prepare  # noqa: E402

ARCHIVE_BYTES = 15 * 2**20
PIECE_SAMPLES = 8000  # of CIFAR, compressed: about 20 MiB
SMALL = {"clients": 6, "clients_per_round": 3, "local_epochs": 1, "batch_size": 60, "rounds": 3, "mask_interval": 2}
MODELS = {"lenet5": "fashionmnist", "alexnet": "cifar10", "resnet18": "cifar100"}
MARGIN = 1.15  # on predicted times
STEPS = ("facts", "tests", "correctness", "three_rounds", "ways", "pace", "benchmark", "runs")
WAYS = {
    "together": {},
    "together, TF32": {"precision": "tf32"},
    "each by itself": {"workers": 1},
    "together, grouped where it is not": {"regrouped": True},
    "together, bf16": {"precision": "bf16"},
    "together, cuDNN's own choice": {"cudnn": "own"},
    "each by itself, TF32": {"precision": "tf32", "workers": 1},
}
"""Ways to train a round's clients (`fast/together.py`)."""


class Slice:
    """The time there is, and the report, which is written whenever something was found.

    Args:
        minutes: of the slice. out: the folder. device: "cuda", or "cpu" to rehearse.
    """

    def __init__(self, minutes: float, out: Path, device: str):
        self.end = time.monotonic() + 60 * minutes
        self.out, self.device, self.report, self.failed = out, device, {}, False

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def step(self, name: str, work: Callable[[], object]) -> None:
        """Do a step and write what it found, or how it failed."""
        begin = time.monotonic()
        try:
            found = work()
        except Exception as error:  # one step's failure is no reason to lose the others
            found, self.failed = {"failed": f"{type(error).__name__}: {error}"}, True
        self.report[name] = {"found": found, "seconds": round(time.monotonic() - begin, 2)}
        self.write()
        print(f"{name}: {json.dumps(plain(found))[:300]}", flush=True)

    def write(self) -> None:
        """The report so far, whole or as it was."""
        text = json.dumps(plain(self.report), indent=1)
        atomic_write(self.out / "report.json", text.encode() + b"\n")


def facts(now: Slice) -> dict:
    """Versions and device."""
    found = provenance(torch.device(now.device), 1, cuda=torch.version.cuda)
    if now.device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {"memory_gib": round(gpu.total_memory / 2**30, 1), "capability": f"{gpu.major}.{gpu.minor}"}
    return found


def tests(now: Slice, seconds: float = 150) -> dict:
    """The tests marked `cuda`; what they print is in tests.txt."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests/fast"]
    limit = max(1.0, min(seconds, now.left - 30))
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        text, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as stopped:
        text, status = (stopped.stdout or b"").decode(), f"stopped after {limit:.0f} s"
    atomic_write(now.out / "tests.txt", text.encode())
    return {"status": status, "summary": text.strip().splitlines()[-1:]}


def correctness(now: Slice) -> list[dict]:
    """A row per model, arithmetic and precision: relative error of loss and gradient, one batch, against float64."""
    precisions = ("float32", "tf32", "bf16") if now.device == "cuda" else ("float32", "bf16")
    rows = []
    for model in MODELS:
        channels, size = INPUT_SHAPES.get(model, (1, 28))
        draw = torch.Generator().manual_seed(1)
        images, labels = torch.rand(48, channels, size, size, generator=draw), torch.arange(48) % 10
        exact, exact_gradient = one_batch(model, images.double(), labels, "cpu", torch.float64, None, "float64")
        for precision in precisions:
            for arithmetic in (kernels_of, None):
                loss, gradient = one_batch(model, images, labels, now.device, torch.float32, arithmetic, precision)
                whole = distance(torch.cat([*gradient.values()]), torch.cat([*exact_gradient.values()]))
                each = {name: distance(values, exact_gradient[name]) for name, values in gradient.items()}
                row = {"model": model, "precision": precision}
                row |= {"arithmetic": "autograd" if arithmetic is None else "fastest here"}
                rows.append({**row, "loss": abs(loss / exact - 1), "gradient": whole, "gradient_of": each})
    return rows


def distance(values: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, of vectors."""
    return float((values - exact).norm() / exact.norm())


def one_batch(
    model: str, images: torch.Tensor, labels: torch.Tensor, device: str, dtype: torch.dtype, arithmetic, precision: str
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of an untrained model without dropout, on one batch: of each tensor a float64 vector on the
    CPU."""
    module = build_model(model, classes=10, width=1.0, channels=images.shape[1], size=images.shape[-1])
    for layer in module.modules():
        if isinstance(layer, Dropout):
            layer.p = 0.0
    flat = FlatModel(module.train(), Layout.of(module), device, dtype)
    kernels = Autograd(flat.module, flat.gradient, precision)
    if arithmetic is not None:
        kernels = arithmetic(flat, images.shape[-1], precision)
    with running(Config(precision=precision if precision in ("tf32", "bf16") else "float32")):
        loss = kernels.loss_and_gradient(images.to(device), labels.to(device))
    return float(loss), {slot.name: slot.of(flat.gradient).double().cpu().flatten() for slot in flat.layout.slots}


def three_rounds(now: Slice) -> list[dict]:
    """A row per model at a quarter of its width, and per way to train the clients, each by itself or together: how far
    three rounds on the digits are from the CPU's, where each trains by itself."""
    rows = []
    for model in MODELS:
        here, mask, accuracy = after_three_rounds(model, "cpu", 1)
        for workers in (1, "together"):
            there, other, reached = after_three_rounds(model, now.device, workers)
            row = {"model": model, "workers": workers, "largest_weight_difference": float((here - there).abs().max())}
            rows.append({**row, "masks_differ_at": int((mask != other).sum()), "accuracy": [accuracy, reached]})
    return rows


def after_three_rounds(model: str, device: str, workers: str | int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(weights, mask, accuracy) at the end, on the CPU."""
    config = Config(model=model, width=0.25, lr=0.05, device=device, workers=workers, **SMALL).resolved()
    state, clients, method = prepare(config)
    with closing(clients.workers), running(config):
        for _ in range(config.rounds):
            state, _ = run_round(state, clients, method, config)
        return state.weights.cpu(), state.mask.cpu(), evaluate_state(state, clients)["accuracy"]


def ways(now: Slice) -> list[dict]:
    """A row per model and way to train the clients: seconds of training and of evaluation per round at the slides'
    setting (medians after a first round that does not count), and device memory. The images are noise, so no data has
    to be here. As many rows as fit into a quarter of the time, the most telling first."""
    rows, until = [], time.monotonic() + now.left / 4
    for name, way in WAYS.items():
        for model, dataset in MODELS.items():
            if time.monotonic() < until and not (now.device == "cpu" and way.get("precision") == "tf32"):
                row = {"model": model, "way": name}
                try:
                    rows.append({**row, **paced(now, model, dataset, way, until)})
                except Exception as error:  # one way's failure is a finding, too
                    rows.append({**row, "failed": f"{type(error).__name__}: {error}"})
                now.report["ways"] = {"found": rows}
                now.write()
    return rows


def workers_for(now: Slice, model: str) -> str | int:
    """How a queue's clients are best trained here: as by default, or each by itself, if training together failed or was
    slower."""
    found = now.report.get("ways", {}).get("found", [])
    rows = [row for row in found if row["model"] == model] if isinstance(found, list) else []
    seconds = {row["way"]: row.get("train_s", math.inf) for row in rows}
    together, alone = (seconds.get(way, math.inf) for way in ("together", "each by itself"))
    return 1 if alone < together and now.device == "cuda" else "auto"


def paced(now: Slice, model: str, dataset: str, way: dict, until: float) -> dict:
    """What a round takes: up to five, as long as there is time, but one at least."""
    chosen = {"workers": "together", **{key: value for key, value in way.items() if key in ("workers", "precision")}}
    if now.device == "cpu":  # a rehearsal
        chosen |= {"width": 0.05, "clients_per_round": 2, "local_epochs": 1, "batch_size": 16}
    images = noise(dataset, few=now.device == "cpu")
    config = Config(model=model, dataset=images, rounds=1000, penalty_max=1e-3, device=now.device, **chosen)
    config = config.resolved()
    state, clients, method = prepare(config)
    state = replace(state, round=config.rounds // 2)  # under a mask, with a penalty
    if way.get("regrouped"):
        clients.together.grouped = not clients.together.grouped
    cuda, train, evaluation = now.device == "cuda", [], []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with closing(clients.workers), running(config):
        if way.get("cudnn") == "own":
            torch.backends.cudnn.deterministic = False  # `running` sets it back
        while len(train) < 6 and (len(train) < 2 or time.monotonic() < until):
            begin = time.monotonic()
            state, _ = run_round(state, clients, method, config)  # looks at the losses: waits for the device
            middle = time.monotonic()
            evaluate_state(state, clients)
            train.append(middle - begin)
            evaluation.append(time.monotonic() - middle)
    row = {"first_s": train[0], "train_s": float(np.median(train[1:])), "evaluate_s": float(np.median(evaluation[1:]))}
    return {**row, "memory_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None}


def noise(dataset: str, *, few: bool) -> str:
    """The name of a data set of random images, of the shapes of `dataset` and as many, or `few`. Made known in this
    process."""
    channels, size, samples = (1, 28, 60000) if dataset == "fashionmnist" else (3, 32, 50000)
    counts = {"train": 1200, "test": 300} if few else {"train": samples, "test": 10000}

    @cache
    def make() -> Dataset:
        draw, arrays = np.random.default_rng(0), {}
        for part, count in counts.items():
            shape = (count, size, size, channels) if channels > 1 else (count, size, size)
            arrays[f"{part}_images"] = draw.integers(0, 256, shape, dtype=np.uint8)
            arrays[f"{part}_labels"] = np.arange(count) % DATASETS[dataset]["classes"]
        return dataset_of(dataset, arrays, "noise", "", "noise")

    DATASETS.setdefault(f"noise-{dataset}", make)
    return f"noise-{dataset}"


def pace(now: Slice, queue: list[Config]) -> list[dict]:
    """A row per setting of the queue whose data is here: seconds per round, training and evaluation, after a first
    round that does not count; as many as fit into a fifth of the time."""
    rows, until = [], time.monotonic() + now.left / 5
    for config in {(c.model, c.dataset, c.width): c for c in reversed(queue)}.values():
        if not is_here(config.dataset) or time.monotonic() > until:
            continue
        config = replace(config, device=now.device, workers=workers_for(now, config.model)).resolved()
        state, clients, method = prepare(config)
        times = []
        with closing(clients.workers), running(config):
            while len(times) < 6 and (len(times) < 2 or time.monotonic() < until):
                begin = time.monotonic()
                state, _ = run_round(state, clients, method, config)
                evaluate_state(state, clients)  # waits for the device
                times.append(time.monotonic() - begin)
        row = {"model": config.model, "dataset": config.dataset, "width": config.width, "precision": config.precision}
        rows.append({**row, "first_s": times[0], "round_s": float(np.median(times[1:])), "rounds": len(times) - 1})
    return rows


def benchmark(now: Slice, seconds: float = 120) -> dict:
    """Seconds per round of LeNet-5 beside the published procedure and others (benchmarks/engine.py), if its data is
    here."""
    if not is_here(MODELS["lenet5"]):
        return {"left out": f"{MODELS['lenet5']} is not here"}
    options = ["--device", now.device, "--cases", "lenet5", "--contenders", "a,b,c,d", "--repeats", "2"]
    command, limit = [sys.executable, "-m", "benchmarks", "engine", *options], max(1.0, min(seconds, now.left / 4))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout[done.stdout.index("{") :])


def side_by_side(now: Slice, queue: list[Config], processes: int) -> dict:
    """The queue by so many programs, until the time is up: what was recorded, each program's exit status, and the last
    line of those that said one."""
    out = now.out.resolve()
    atomic_write(out / "queue.yaml", yaml.safe_dump({"queue": [asdict(config) for config in queue]}).encode())
    command = [sys.executable, "-m", "feddip_lite", "sweep", out / "queue.yaml", "--results", out / "results"]
    command += ["--quiet", "--time-limit", str(max(1, int(now.left - 30)))]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if now.device == "cpu" else {})
    words = [out / f"program{number}.txt" for number in range(processes)]
    programs = []
    for path in words:
        with open(path, "wb") as file:
            streams = {"stdout": subprocess.DEVNULL, "stderr": file}
            programs.append(subprocess.Popen(command, cwd=ROOT, env=environment, **streams))
    status = [program.wait() for program in programs]
    now.failed |= any(status)
    pack(now.out)
    done = [config.run_id for config in queue if (out / "results" / f"{config.run_id}.json").exists()]
    return {"done": done, "status": status, "said": [path.read_text().strip().splitlines()[-1:] for path in words]}


def runs(now: Slice, queue: list[Config]) -> dict:
    """The queue, as far as the time goes: what was recorded, and what was left for which reason."""
    found = now.report["pace"]["found"] if "pace" in now.report else pace(now, queue)
    paces = {(row["model"], row["dataset"], row["width"]): row for row in found}
    recording, done, left = Recording(now.out / "results"), [], {}
    for config in queue:
        if recording.stored(config) is not None:
            done.append(config.run_id)
            continue
        known = paces.get((config.model, config.dataset, config.width))
        if known is None:
            left[config.run_id] = "its data is not here" if not is_here(config.dataset) else "its pace is not known"
            continue
        needed = MARGIN * (known["first_s"] + config.rounds * known["round_s"])
        if needed > now.left - 15:
            left[config.run_id] = f"would take {needed:.0f} s"
            continue
        try:
            here = {"device": now.device, "workers": workers_for(now, config.model)}
            execute(replace(config, **here), recording, deadline=now.end - 10)
            done.append(config.run_id)
        except OutOfTime as stopped:
            left[config.run_id] = str(stopped)
            break
        except (ClientFailure, Diverged) as error:
            left[config.run_id] = str(error)
        now.report["runs"] = {"found": {"done": done, "left": left}}
        now.write()
    pack(now.out)
    return {"done": done, "left": left}


def pack(out: Path) -> None:
    """Put what `results` holds into results.tar: records first, then models and checkpoints as far as they fit."""
    order = (".json", ".csv", ".mask", ".safetensors", ".checkpoint")
    files = [path for path in (out / "results").glob("*.*") if path.suffix in order and ".partial" not in path.name]
    files.sort(key=lambda path: (order.index(path.suffix), path.name))
    part, size = out / ".results.tar", 0
    with tarfile.open(part, "w") as archive:
        for path in files:
            size += path.stat().st_size + 1024
            if size <= ARCHIVE_BYTES:
                archive.add(path, path.name)
    os.replace(part, out / "results.tar")


def unpack(archive: Path, out: Path) -> None:
    """The records of an earlier slice. Raises ValueError for a damaged archive."""
    try:
        with tarfile.open(archive) as packed:
            packed.extractall(out / "results", filter="data")
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{archive}: damaged, or no archive of results ({error})") from error


def is_here(dataset: str) -> bool:
    """Whether a data set can be read without a download."""
    return files_here(dataset, Path(os.environ.get("FEDDIP_DATA") or "data").expanduser()) is not None


def split(name: str, folder: Path) -> list[Path]:
    """Write pieces of an npz data set into `folder`, each small enough to travel by itself."""
    path = files_of(name, Path(os.environ.get("FEDDIP_DATA") or "data").expanduser())[KEYS[0]]
    folder.mkdir(parents=True, exist_ok=True)
    pieces = []
    with np.load(path, allow_pickle=False) as whole:
        arrays = {key: whole[key] for key in KEYS}
    for part in ("train", "test"):
        for number, start in enumerate(range(0, len(arrays[f"{part}_labels"]), PIECE_SAMPLES)):
            some = {key: arrays[f"{part}_{key}"][start : start + PIECE_SAMPLES] for key in ("images", "labels")}
            pieces.append(folder / f"{name}.{part}.{number:03d}.npz")
            np.savez_compressed(pieces[-1], **some, of=len(arrays[f"{part}_labels"]))
    return pieces


def join(folder: Path) -> list[Path]:
    """Make data sets of the pieces in `folder` whole again, where all are there. Returns their files.

    Raises:
        ValueError: a piece is damaged.
    """
    root, made = Path(os.environ.get("FEDDIP_DATA") or "data").expanduser(), []
    for name in sorted({path.name.split(".")[0] for path in folder.glob("*.*.*.npz")}):
        arrays, whole = {}, True
        for part in ("train", "test"):
            loaded = [_piece(path) for path in sorted(folder.glob(f"{name}.{part}.*.npz"))]
            whole = whole and bool(loaded) and sum(len(each["labels"]) for each in loaded) == int(loaded[0]["of"])
            for key in ("images", "labels") if whole else ():
                arrays[f"{part}_{key}"] = np.concatenate([each[key] for each in loaded])
        if whole:
            content = io.BytesIO()
            np.savez(content, **arrays)
            atomic_write(root / f"{name}.npz", content.getvalue())
            made.append(root / f"{name}.npz")
    return made


def _piece(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as piece:
            return {key: piece[key] for key in ("images", "labels", "of")}
    except Exception as error:  # a damaged archive fails in many ways
        raise ValueError(f"{path}: damaged piece ({error}); send it again") from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", default="8", help="of the slice, all steps together; default: 8")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("build/gpu"), help="default: build/gpu")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a rehearsal")
    parser.add_argument("--queue", type=Path, default=ROOT / "params" / "paper.yaml", help="default: params/paper.yaml")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"comma-separated, of: {','.join(STEPS)}")
    parser.add_argument("--processes", type=int, default=1, help="programs that share the queue; default: 1")
    parser.add_argument("--commit", help="of this checkout, where it has no .git; enters the records")
    parser.add_argument("--resume", type=Path, metavar="TAR", help="the results.tar of an earlier slice")
    parser.add_argument("--split", metavar="NAME", help="write pieces of cifar10 or cifar100 into OUT, and end")
    parser.add_argument("--join", type=Path, metavar="DIR", help="first make data sets of the pieces in DIR whole")
    given = parser.parse_args(arguments)
    status, line = guarded(lambda: work(given))
    if line:
        print(f"tools/gpu.py: {line}", file=sys.stderr)
    return status


def work(given: argparse.Namespace) -> int:
    """The steps. Returns the exit status."""
    minutes = real("(0, 600]").require("--minutes", float(given.minutes))
    if given.split:
        print("\n".join(f"{path}: {path.stat().st_size / 2**20:.1f} MiB" for path in split(given.split, given.out)))
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: 'cuda' is not valid, torch sees no GPU here; expected cpu, for a rehearsal")
    if given.commit:
        os.environ[COMMIT] = given.commit
    processes = integer(1, 64).require("--processes", given.processes)
    asked = given.steps.split(",")
    if unknown := sorted(set(asked) - set(STEPS)):
        raise ValueError(f"--steps: {unknown[0]!r} is not valid; expected some of {','.join(STEPS)}")
    recorded = ROOT / "results" / given.queue.stem
    queue = [run for run in load_profile(given.queue) if not (recorded / f"{run.run_id}.json").exists()]
    now = Slice(minutes, given.out, given.device)
    if given.resume:
        unpack(given.resume, given.out)
    if given.join:
        now.step("data", lambda: [str(path) for path in join(given.join)])
    steps = {
        "facts": lambda: facts(now),
        "tests": lambda: tests(now),
        "correctness": lambda: correctness(now),
        "three_rounds": lambda: three_rounds(now),
        "ways": lambda: ways(now),
        "pace": lambda: pace(now, queue),
        "benchmark": lambda: benchmark(now),
        "runs": lambda: side_by_side(now, queue, processes) if processes > 1 else runs(now, queue),
    }
    for name in STEPS:
        if name in asked:
            now.step(name, steps[name])
    return int(now.failed)


if __name__ == "__main__":
    sys.exit(main())
