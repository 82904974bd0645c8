"""Laws of notebooks that fail: a status that is not 0, their name and the error, and what they got to is kept."""

import json

import jupyter_client.kernelspec
import nbformat
import pytest
from conftest import FAST, TINY, names, read_outputs, same_history, tiny_config
from test_setup import notebook, tool

from feddip_lite import run
from feddip_lite.records.store import ROOT, read_run

KILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
CELLS = {
    "a failing cell": ("raise ValueError('sparsity ran away')", "cell [4]: ValueError: sparsity ran away"),
    "a dead kernel": (KILL, "DeadKernelError: Kernel died"),
    "a time-out": ("import time; time.sleep(60)", "a cell took longer than 2 s"),
    "a missing kernel": ("1", "NoSuchKernel: No such kernel named python3"),
}


@pytest.fixture
def reproduce(tmp_path, monkeypatch, capsys):
    """`reproduce(...)` runs the notebooks in `tmp_path`: status, lines on stderr, folder of the executed copies."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    module = tool("reproduce")

    def call(*arguments):
        read_outputs(capsys)
        status = module.main(["--notebooks", str(tmp_path), "--out", str(tmp_path / "out"), *arguments])
        return status, read_outputs(capsys)[1], tmp_path / "out"

    return call


@pytest.mark.parametrize("case", CELLS)
def test_failing_notebook_ends_the_run_and_is_kept(tmp_path, monkeypatch, reproduce, case):
    cell, reason = CELLS[case]
    notebook(tmp_path / "00_broken.ipynb", "print('so far so good')", cell, "print('unreachable')")
    notebook(tmp_path / "01_next.ipynb", "1")
    if case == "a missing kernel":

        def missing(self, name):
            raise jupyter_client.kernelspec.NoSuchKernel(name)

        monkeypatch.setattr(jupyter_client.kernelspec.KernelSpecManager, "get_kernel_spec", missing)
    status, err, out = reproduce("--jobs=1", "--timeout=2" if case == "a time-out" else "--timeout=60")
    assert status == 1
    assert len(err) == 1
    assert err[0].startswith("stopped: 00_broken failed: ")
    assert reason in err[0]
    kept = (out / "00_broken.ipynb").read_text()
    nbformat.validate(nbformat.reads(kept, as_version=4))
    assert ("so far so good\\n" in kept) == (case != "a missing kernel")
    assert '"unreachable\\n' not in kept
    assert not (out / "01_next.ipynb").exists()
    assert "00_broken" in (out / "index.html").read_text()


RUN = f"""
import json, os, pathlib
from feddip_lite import Config, run
from feddip_lite.train.observe import Observer

folder = pathlib.Path(os.environ["TEST_FOLDER"])
class Deadly(Observer):
    def round_done(self, run, record):
        if record.round == 2 and not (folder / "repaired").exists():
            os.kill(os.getpid(), 9)

config = Config(**json.loads('{json.dumps({**TINY, **FAST, "rounds": 5})}'))
history = run(config, results_dir=folder, checkpoint_every=1, observers=[Deadly()])
"""


@pytest.mark.slow
def test_notebook_killed_in_the_middle_of_a_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch, reproduce):
    config = tiny_config(**FAST, rounds=5)
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setenv("TEST_FOLDER", str(folder))
    notebook(tmp_path / "00_run.ipynb", RUN, "print(len(history), 'rounds')")
    status, err, _ = reproduce()
    assert status == 1 and "DeadKernelError" in err[0]
    assert names(folder) == [f"{config.run_id}.checkpoint"]
    (folder / "repaired").touch()
    status, err, out = reproduce()
    assert status == 0
    assert "5 rounds" in (out / "00_run.ipynb").read_text()
    assert same_history(read_run(folder, config.run_id)[0], run(config, progress=False))


def test_misspelt_parameter_ends_the_run_before_anything_is_executed(tmp_path, reproduce):
    notebook(tmp_path / "00_fine.ipynb", "1")
    notebook(tmp_path / "01_typo.ipynb", "1", parameter='PROFIL = "quick"')
    status, err, out = reproduce()
    assert status == 2
    assert err == ["01_typo: no parameter 'PROFILE', its tagged cell has PROFIL"]
    assert not out.exists()
