"""Laws of writing: at every step of a write, whatever fails there, the old file is left or the new one is there."""

import errno
import os
import signal

import pytest
import torch
from conftest import flags, interrupted, names, read_outputs, record_files, same_history, tiny_config
from test_store import history_of
from victims import LAYERS, MASK, MODEL, STEPS, Faults, child, doomed_checkpoint, doomed_record, limited

from feddip_lite import run
from feddip_lite.__main__ import main
from feddip_lite.records.store import read_mask, read_run, run_lock, save_run
from feddip_lite.train.checkpoint import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
SHORT = {"clients": 4, "clients_per_round": 2, "batch_size": 128, "method": "feddst", "mask_interval": 1}
CONFIG = tiny_config(**SHORT, preset="repo")  # its clients keep masks, so a checkpoint holds something of everything
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
DEATHS = (*ERRORS, "kill -9")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of CONFIG after rounds 1 and 2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.set_num_threads(1)
    interrupted(CONFIG, folder, stops=1)
    path = folder / f"{CONFIG.run_id}.checkpoint"
    path.rename(folder / "one")
    save_checkpoint(path, load_checkpoint(folder / "one", CONFIG, CPU), CONFIG)
    interrupted(CONFIG, folder, stops=1)
    path.rename(folder / "two")
    return folder / "one", folder / "two"


BEST_EFFORT = ("open folder", "fsync folder")
"""Steps after which the file is there, whatever becomes of them: some file systems cannot sync a folder."""


def fail_with(number):
    def fail():
        raise OSError(number, os.strerror(number))

    return fail


def parts(folder):
    return [path.name for path in folder.rglob("*.part")]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("death", DEATHS, ids=str)
@pytest.mark.parametrize("there", [True, False], ids=["a checkpoint is there", "none is there"])
def test_checkpoint_is_the_old_one_or_the_new_one_at_every_step(tmp_path, monkeypatch, checkpoints, there, death, step):
    one, two = checkpoints
    path = tmp_path / f"{CONFIG.run_id}.checkpoint"
    if there:
        path.write_bytes(one.read_bytes())
    if death == "kill -9":
        process = child(doomed_checkpoint, two, path, CONFIG, step)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    else:
        progress = load_checkpoint(two, CONFIG, CPU)
        with monkeypatch.context() as patch:
            Faults(step, fail_with(death)).install(lambda *a: patch.setattr(*a, raising=False))
            if step in BEST_EFFORT:
                save_checkpoint(path, progress, CONFIG)
            else:
                with pytest.raises(OSError, match=os.strerror(death)) as caught:
                    save_checkpoint(path, progress, CONFIG)
                assert str(path) in str(caught.value)
        assert parts(tmp_path) == []
    if STEPS.index(step) >= STEPS.index("renamed"):
        assert load_checkpoint(path, CONFIG, CPU).state.round == 2
    elif there:
        assert path.read_bytes() == one.read_bytes()
    else:
        assert not path.exists()
    with run_lock(tmp_path, CONFIG.run_id):  # whoever goes on clears what a killed process left
        assert parts(tmp_path) == []


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("suffix", [".csv", ".mask", ".safetensors", ".json"])
@pytest.mark.parametrize("death", [errno.ENOSPC, "kill -9"], ids=str)
def test_result_is_complete_or_not_there_at_every_step(tmp_path, monkeypatch, death, suffix, step):
    config, history, left = CONFIG.resolved(), history_of(), {"layers": LAYERS, "mask": MASK, "model": MODEL}
    if death == "kill -9":
        process = child(doomed_record, tmp_path, config, history, step, suffix)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    else:
        with monkeypatch.context() as patch:
            Faults(step, fail_with(death), suffix).install(lambda *a: patch.setattr(*a, raising=False))
            if step in BEST_EFFORT:
                save_run(tmp_path, config, history, {}, [], **left)
            else:
                with pytest.raises(OSError, match=f"{config.run_id}{suffix}"):
                    save_run(tmp_path, config, history, {}, [], **left)
        assert parts(tmp_path) == []
    complete = (
        (step in BEST_EFFORT and death != "kill -9")
        or suffix == ".json"
        and STEPS.index(step) >= STEPS.index("renamed")
    )
    stored = read_run(tmp_path, config.run_id)
    assert stored[0].equals(history) if complete else stored is None
    with run_lock(tmp_path, config.run_id):
        save_run(tmp_path, config, history, {}, [], **left)
    assert read_run(tmp_path, config.run_id)[0].equals(history)
    assert torch.equal(read_mask(tmp_path, config.run_id), MASK)
    assert (tmp_path / f"{config.run_id}.safetensors").read_bytes() == MODEL
    assert names(tmp_path) == record_files(config.run_id)


# A full disk, a folder without rights: what the command line says


def test_full_disk_stops_the_run_with_one_line_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    arguments = ["run", *flags(**SHORT, rounds=4, preset="repo"), "--quiet", "--checkpoint-every=1"]
    config = tiny_config(**SHORT, rounds=4, preset="repo")
    path = tmp_path / f"{config.run_id}.checkpoint"
    for suffix, nth, saved in ((".checkpoint", 3, 2), (".csv", 1, 3), (".mask", 1, 3), (".json", 1, 3)):
        with monkeypatch.context() as patch:
            Faults("write", fail_with(errno.ENOSPC), suffix, nth).install(lambda *a: patch.setattr(*a, raising=False))
            assert main([*arguments, f"--results={tmp_path}"]) == 1
        out, err = read_outputs(capsys)
        assert (out, len(err)) == ([], 1)
        assert "No space left on device" in err[0]
        assert str(tmp_path / f"{config.run_id}{suffix}") in err[0]
        assert load_checkpoint(path, config, CPU).state.round == saved
        assert parts(tmp_path) == []
    assert main([*arguments, f"--results={tmp_path}"]) == 0
    assert same_history(read_run(tmp_path, config.run_id)[0], run(config, progress=False))


@pytest.mark.parametrize("limit", ["size", "rights"])
def test_files_that_cannot_grow_and_folders_without_rights_stop_the_run_with_one_line(tmp_path, checkpoints, limit):
    """Refused by the system itself, in a process of its own."""
    folder, report = tmp_path / "results", tmp_path / "report"
    folder.mkdir()
    path = folder / f"{CONFIG.run_id}.checkpoint"
    path.write_bytes(checkpoints[0].read_bytes())
    folder.chmod(0o555 if limit == "rights" else 0o755)
    arguments = ["run", *flags(**SHORT, preset="repo"), "--quiet", "--checkpoint-every=1", f"--results={folder}"]
    process = child(limited, arguments, report, limit)
    process.join(60)
    folder.chmod(0o755)
    (line,) = report.read_text().splitlines()
    assert process.exitcode == 1
    assert str(folder) in line
    assert ("File too large" if limit == "size" else "Permission denied") in line
    assert path.read_bytes() == checkpoints[0].read_bytes()
    assert names(folder) == [path.name]
