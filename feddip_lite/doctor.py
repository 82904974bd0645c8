"""What is installed here, what is missing and what is broken: `make doctor`, `python -m feddip_lite doctor`.

Each check yields (sentence, is_fault). A fault is something that makes runs fail or lie; a missing GPU, data set or
notebook tool is none. Only the standard library is imported at the top: a broken torch is reported, not suffered.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

DISTRIBUTION = "feddip-lite"
NEEDS = (
    "numpy", "pandas", "scipy", "scikit-learn", "torch", "torchvision", "pyyaml", "matplotlib", "tqdm", "filelock",
    "safetensors",
)  # fmt: skip
NOTEBOOK_TOOLS = ("papermill", "nbconvert", "ipykernel", "nbmake")
MIN_FREE_GB = 1.0

# Where load_dataset looks (design section 8). Looked at first: asking for a set that is not there would download it.
_PARTS = ("images-idx3", "labels-idx1")
_IDX = [f"FashionMNIST/raw/{half}-{part}-ubyte" for half in ("train", "t10k") for part in _PARTS]
DATA_FILES = {"digits": [], "fashionmnist": _IDX, "cifar10": ["cifar10.npz"], "cifar100": ["cifar100.npz"]}

Finding = tuple[str, bool]


def report(root: str | os.PathLike | None = None) -> tuple[list[str], list[str]]:
    """Look at this machine and return (lines, faults): one sentence per fact, one per fault; no faults means ready.

    Args:
        root: folder of the data sets; None means $FEDDIP_DATA, else "data". Nothing is downloaded or written.
    """
    folder = Path(root if root is not None else os.environ.get("FEDDIP_DATA") or "data")
    lines, faults = [], []
    for findings in (_python(), _libraries(), _torch(), _data(folder), _disk(folder), _notebooks()):
        for sentence, is_fault in findings:
            (faults if is_fault else lines).append(sentence)
    return lines, faults


def main(root: str | os.PathLike | None = None) -> int:
    """Print the report, faults last, and return the exit code: 1 if there is a fault, else 0."""
    lines, faults = report(root)
    print("\n".join(lines + [f"FAULT: {fault}" for fault in faults]))
    print(f"{len(faults)} fault{'s' * (len(faults) != 1)}" if faults else "ready")
    return 1 if faults else 0


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Iterator[Finding]:
    yield f"python {sys.version.split()[0]}, {sys.executable}", False
    installed = version(DISTRIBUTION) or "(run from its folder, not installed)"
    try:
        commit = import_module("feddip_lite.records.provenance").commit() or "no commit"
    except Exception as error:  # a broken torch, which `_torch` names
        commit = f"does not import ({_last_line(str(error))})"
    yield f"feddip_lite {installed}, {commit}", False


def _libraries() -> Iterator[Finding]:
    yield "libraries: " + ", ".join(f"{name} {version(name) or 'missing'}" for name in NEEDS), False
    for name in NEEDS:
        if version(name) is None:
            yield f"{name} is not installed: run `make setup`", True
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return
    for text in metadata.requires(DISTRIBUTION) or [] if version(DISTRIBUTION) else []:
        need = Requirement(text)
        found = version(need.name) if need.marker is None else None  # extras are optional
        if found and not need.specifier.contains(found, prereleases=True):
            yield f"{need.name} {found} is installed, needed is {need.specifier}: run `make clean-env setup`", True


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        yield f"torch does not import ({_last_line(str(error))}): run `make clean-env setup`", True
        return
    gpu, built = import_module("feddip_lite.records.provenance").device_name(), torch.version.cuda or torch.version.hip
    if gpu == "no GPU" and shutil.which("nvidia-smi"):
        why = f"driver too old for CUDA {built}, or the GPU is hidden" if built else "this torch is a CPU build"
        gpu += f" that torch can use, though nvidia-smi is here ({why})"
    yield f"device: {gpu}", False
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"CPU: {cpus} cores for this process, {torch.get_num_threads()} torch threads", False
    yield from _torchvision()


def _torchvision() -> Iterator[Finding]:
    """Import in a fresh process: a torchvision that was built for another torch dies, and may take others with it."""
    if version("torchvision") is None:  # already said
        return
    code = "import torchvision; torchvision.ops.nms"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if child.returncode == 0:
        yield "torch and torchvision fit together", False
        return
    reason = _last_line(child.stderr) or f"exit code {child.returncode}"
    if "torchvision::" in reason:  # "operator torchvision::nms does not exist"
        reason += "; the two were built for different devices"
    yield f"torchvision does not import ({reason}): run `make clean-env setup`", True


def _data(root: Path) -> Iterator[Finding]:
    for name, files in DATA_FILES.items():
        missing = [file for file in files if not (root / file).is_file()]
        if files and len(missing) == len(files):
            where = files[0].rsplit("/", 1)[0] if len(files) > 1 else files[0]
            yield f"{name}: not found ({root / where}); downloaded at first use, or set FEDDIP_DATA", False
        elif missing:
            yield f"{name}: incomplete, {root / missing[0]} is missing: add it or delete the others", True
        else:
            yield _load(name, root)


def _load(name: str, root: Path) -> Finding:
    try:
        data = import_module("feddip_lite.data.datasets").load_dataset(name, root)
    except Exception as error:  # whatever it is, the user has to hear it in one line
        return f"{name}: damaged or unreadable, {_last_line(str(error)) or type(error).__name__}", True
    images = f"{len(data.train_images)} + {len(data.test_images)} images"
    held = "checksum not known" if data.variant == "unrecognised" else "checksum holds"
    return f"{name}: {images}, {data.variant}, {held} ({data.sha256[:12]}), {data.source}", False


def _disk(root: Path) -> Iterator[Finding]:
    folders = [Path.cwd()] + [root] * root.is_dir()
    for folder in {folder.stat().st_dev: folder for folder in reversed(folders)}.values():  # one line per disk
        free = shutil.disk_usage(folder).free / 1e9
        short = free < MIN_FREE_GB
        yield f"disk: {free:.1f} GB free in {folder}" + f", needed is {MIN_FREE_GB:g} GB" * short, short


def _notebooks() -> Iterator[Finding]:
    missing = [name for name in NOTEBOOK_TOOLS if version(name) is None]
    yield f"notebook tools: {'not here: ' + ', '.join(missing) + ' (make setup)' if missing else 'present'}", False


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip() if text.strip() else ""


if __name__ == "__main__":
    sys.exit(main())
