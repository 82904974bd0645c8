"""Laws of the doctor: facts are lines, broken things are faults, nothing is downloaded."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from feddip_lite import doctor
from feddip_lite.data.files import files_of

RAW = Path("FashionMNIST", "raw")


def damaged_fashion_mnist(root):
    (root / RAW).mkdir(parents=True)
    for path in files_of("fashionmnist", root).values():
        path.write_bytes(b"<html>not found</html>")
    return root


def data_findings(root):
    found = list(doctor._data(root))
    return [line for line, is_fault in found if not is_fault], [line for line, is_fault in found if is_fault]


def test_the_report_names_what_decides_a_result(tmp_path):
    lines, _ = doctor.report(tmp_path)
    text = "\n".join(lines)
    for word in (
        "python 3.",
        "feddip-lite ",
        "numpy ",
        "torch ",
        "commit ",
        "CPU(s): ",
        "cuda available: ",
        "GB free",
        "notebook",
    ):
        assert word in text
    assert all("\n" not in line for line in lines)


def test_every_dependency_is_looked_at():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(doctor.NEEDS) == {Requirement(text).name for text in project["dependencies"]}
    modules = metadata.packages_distributions()
    for name in doctor.NEEDS:
        found = [each.lower().replace("_", "-") for each in modules[doctor.MODULES.get(name, name)]]
        assert found == [name]


def test_a_missing_data_set_is_no_fault_and_is_not_downloaded(tmp_path):
    lines, faults = data_findings(tmp_path)
    assert sum("not found" in line for line in lines) == 3  # all but digits, which is always there
    assert faults == [] and list(tmp_path.iterdir()) == []


def test_the_bundled_digits_hold_their_checksum(tmp_path):
    lines, _ = data_findings(tmp_path)
    assert any(line.startswith("digits: 1437 + 360 images") and "checksum holds" in line for line in lines)


def test_a_damaged_data_set_is_one_fault_in_one_line_and_exit_code_1(tmp_path, capsys):
    assert doctor.main(damaged_fashion_mnist(tmp_path)) == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAULT")]
    assert sum("fashionmnist: damaged" in fault for fault in faults) == 1


def test_an_incomplete_data_set_is_a_fault_that_names_the_missing_file(tmp_path):
    gone = damaged_fashion_mnist(tmp_path) / RAW / "t10k-labels-idx1-ubyte"
    gone.unlink()
    _, faults = data_findings(tmp_path)
    assert len(faults) == 1 and "fashionmnist: incomplete" in faults[0] and gone.name in faults[0]


def test_too_little_disk_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "MIN_FREE_GB", 1e9)
    assert all(is_fault and line.startswith("disk:") for line, is_fault in doctor._disk(tmp_path))


@pytest.mark.parametrize(
    "broken, error",
    [
        ("torch", 'OSError("libcudart.so: cannot open shared object file")'),
        ("torchvision", 'RuntimeError("operator torchvision::nms does not exist")'),
        ("yaml", "ModuleNotFoundError(\"No module named 'yaml'\")"),
    ],
)
def test_a_library_that_does_not_import_is_one_fault_in_one_line(tmp_path, broken, error):
    (tmp_path / f"{broken}.py").write_text(f"raise {error}\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "FEDDIP_DATA": str(tmp_path)}
    command = [sys.executable, "-P", doctor.__file__]  # as `make doctor` does
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    (fault,) = (line for line in done.stdout.splitlines() if line.startswith("FAULT"))
    reason = error.replace('("', ": ").removesuffix('")')
    assert fault == f"FAULT: {broken} does not import ({reason}): run `make clean-env setup`"


def test_a_library_of_another_version_than_the_package_asks_for_is_a_fault(tmp_path):
    fake = tmp_path / "feddip_lite-9.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: feddip-lite\nVersion: 9\nRequires-Dist: numpy>=99\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(doctor.__file__).parents[1]}"}
    code = "from feddip_lite import doctor; print(*doctor._libraries(), sep='\\n')"
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert "feddip-lite 9 has requirement numpy>=99, but you have numpy" in done.stdout.splitlines()[-1]


@pytest.mark.data
def test_real_fashion_mnist_is_found_and_holds():
    root = Path(os.environ.get("FEDDIP_DATA") or "data")
    if not (root / RAW).is_dir():
        pytest.skip("Fashion-MNIST is not here (FEDDIP_DATA)")
    lines, _ = data_findings(root)
    assert any(line.startswith("fashionmnist: 60000 + 10000 images, official, checksum holds") for line in lines)
