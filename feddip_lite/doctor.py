"""What is installed here, what is missing and what is broken: `make doctor`, `python -m feddip_lite doctor`.

Each check yields (sentence, is_fault). A fault is something that makes runs fail or lie; a missing GPU, data set or
notebook tool is none. Only the standard library is imported at the top: a broken library is reported, not suffered.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

DISTRIBUTION = "feddip-lite"
# Those that others build on come first: of libraries that cannot be imported, the first is named.
NEEDS = (
    "numpy", "pandas", "scipy", "scikit-learn", "torch", "torchvision", "pyyaml", "matplotlib", "tqdm", "filelock",
    "safetensors",
)  # fmt: skip
MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml", DISTRIBUTION: "feddip_lite"}
NOTEBOOK_TOOLS = ("papermill", "nbconvert", "ipykernel", "seaborn", "jupyterlab", "nbmake", "onnx", "onnxruntime")
FACTS = (
    "os", "cpu_info", "is_cuda_available", "nvidia_gpu_models", "nvidia_driver_version", "cuda_compiled_version",
    "cuda_runtime_version", "cudnn_version",
)  # fmt: skip
"""What of `torch.utils.collect_env` decides whether and how fast runs go."""
MIN_FREE_GB = 1.0

Finding = tuple[str, bool]


def report(root: str | os.PathLike | None = None) -> tuple[list[str], list[str]]:
    """Look at this machine and return (lines, faults): one sentence per fact, one per fault; no faults means ready.

    Args:
        root: folder of the data sets; None means $FEDDIP_DATA, else "data". Nothing is downloaded or written.
    """
    folder = Path(root if root is not None else os.environ.get("FEDDIP_DATA") or "data")
    findings = [*_libraries()]
    if not any(is_fault for _, is_fault in findings):
        findings += [*_machine(), *_data(folder)]
    findings += [*_disk(folder), *_notebooks()]
    return tuple([sentence for sentence, is_fault in findings if is_fault == wanted] for wanted in (False, True))


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


def _libraries() -> Iterator[Finding]:
    """Versions, and the first library that cannot be imported, if any, else those whose version is not what the package
    asks for. Tried in a fresh process: a torchvision that was built for another torch dies, and may take others along.
    """
    yield f"python {sys.version.split()[0]}, {sys.executable}", False
    yield ", ".join(f"{name} {version(name) or 'missing'}" for name in (*NEEDS, DISTRIBUTION)), False
    modules = [MODULES.get(name, name) for name in (*NEEDS, DISTRIBUTION)]
    done = _python("-c", f"for name in {modules}: print(name, flush=True); __import__(name)")
    if done.returncode:
        reason = _last_line(done.stderr) or f"exit code {done.returncode}"
        yield f"{_last_line(done.stdout)} does not import ({reason}): run `make clean-env setup`", True
        return
    for line in _python("-m", "pip", "check").stdout.splitlines():
        if line.startswith(f"{DISTRIBUTION} "):
            yield f"{line} Run `make clean-env setup`", True


def _python(*arguments: str) -> subprocess.CompletedProcess:
    flags = ["-P"] * sys.flags.safe_path
    return subprocess.run([sys.executable, *flags, *arguments], capture_output=True, text=True)


def _machine() -> Iterator[Finding]:
    """As torch reports it. CUDA that is not available beside a GPU and a driver: torch is a build for others."""
    commit = import_module("feddip_lite.records.provenance").commit()
    yield f"commit of feddip_lite: {commit or 'none'}", False
    found = import_module("torch.utils.collect_env").get_env_info()
    for name in FACTS:
        lines = [" ".join(line.split()) for line in str(getattr(found, name)).splitlines()]
        if name == "cpu_info":
            lines = [line for line in lines if line.startswith(("CPU(s):", "Model name:"))]
        yield f"{name.replace('_', ' ')}: {'; '.join(lines)}", False


def _data(root: Path) -> Iterator[Finding]:
    files = import_module("feddip_lite.data.files")
    for name in files.IMAGE_SHAPES:
        paths = set(files.files_of(name, root).values())
        missing = sorted(path for path in paths if not path.is_file()) if files.files_here(name, root) is None else []
        if missing and len(missing) == len(paths):
            yield f"{name}: not found ({missing[0]}); downloaded at first use, or set FEDDIP_DATA", False
        elif missing:
            yield f"{name}: incomplete, {missing[0]} is missing: add it or delete the others", True
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
