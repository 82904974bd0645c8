"""Laws of what shows a run while it goes on: all rows arrive, once, over an interruption too; nothing is changed."""

import sys
import time

import pytest
from conftest import FAST, same_history, tiny_config

from feddip_lite import run
from feddip_lite.core.errors import OutOfTime
from feddip_lite.report.live import LiveCurve, TensorBoard
from feddip_lite.train.recording import Recording
from feddip_lite.train.run import execute


def test_tensorboard_has_every_row_once_also_after_an_interruption(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(rounds=4, **FAST)
    with pytest.raises(OutOfTime):
        execute(config, Recording(tmp_path), [TensorBoard(tmp_path / "board")], deadline=time.monotonic())
    history = run(config, results_dir=tmp_path, progress=False, observers=[TensorBoard(tmp_path / "board")])
    found = EventAccumulator(str(tmp_path / "board" / config.run_id)).Reload()
    for name in ("accuracy", "loss", "sparsity", "mask/regrown"):
        scalars = found.Scalars(name)
        assert [each.step for each in scalars] == history["round"].tolist()
        column = history[name.removeprefix("mask/")]
        assert [each.value for each in scalars] == pytest.approx(column.tolist(), rel=1e-6)
    sent = (history["up_bytes"] + history["down_bytes"]).cumsum() / 2**20
    assert [each.value for each in found.Scalars("mib")] == pytest.approx(sent.tolist(), rel=1e-6)
    assert same_history(history, run(config, progress=False))


def test_without_tensorboard_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard is not installed .*; install feddip-lite.tensorboard."):
        TensorBoard(tmp_path)


@pytest.mark.usefixtures("agg")
def test_a_live_curve_ends_with_the_history():
    curve = LiveCurve(("accuracy", "loss"))
    history = run(tiny_config(rounds=3, **FAST), progress=False, observers=[curve])
    for line, column in zip(curve.lines, ("accuracy", "loss"), strict=True):
        assert line.get_xdata().tolist() == history["round"].tolist()
        assert line.get_ydata().tolist() == history[column].tolist()
