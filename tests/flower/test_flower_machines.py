"""On Flower itself: superlink, supernodes and Ray. Minutes each; fast ones are in test_flower_server.py."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import environment, tiny_config

from feddip_lite import run
from feddip_lite.core.errors import ClientFailure
from feddip_lite.records.store import ROOT, read_run

pytest.importorskip("flwr", reason="the extra feddip-lite[flower] is not installed (make flower)")

from feddip_lite.flower.parity import fingerprint
from feddip_lite.flower.processes import Federation, launch

pytestmark = pytest.mark.slow
SMALL = {"clients": 3, "clients_per_round": 3, "width": 0.3}
PATIENT = {"join_timeout": 600.0, "reply_timeout": 240.0}  # a node starts a process for every message
END_SECONDS = 1200.0  # of any run here, on a busy machine


@pytest.mark.parametrize("engine", ["simulation", "deployment"])
def test_the_same_bits_three_ways(engine, tmp_path):
    """`make flower-test` demands it of three methods: FedAvg, FedDIP, and FedDST, whose clients remember."""
    command = [sys.executable, str(ROOT / "tools" / "flower.py"), "--engines", engine, "--folder", str(tmp_path / "f")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 methods: the same bits" in done.stdout


def images(folder, config):
    from test_flower_server import images_of

    images_of(config, folder)
    return folder


def test_each_kind_of_failure_is_the_policys_to_judge_and_never_hangs(tmp_path, monkeypatch):
    """Of five clients one is honest; the others raise, damage, die and stall in the middle of the round."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'flower'}")
    config = tiny_config(clients=5, clients_per_round=5, width=0.1, rounds=1, on_client_failure="skip")
    folder = images(tmp_path / "images", config)
    harm = ["", "saboteur:raises", "saboteur:damages", "saboteur:dies", "saboteur:stalls"]

    def node(client):
        return {"folder": str(folder / str(client)), "data": harm[client]}

    with Federation(tmp_path / "home", 5, "deployment", node) as federation:
        start = time.monotonic()
        federation.wait(federation.submit(config, tmp_path / "skip", **PATIENT), END_SECONDS)
        _, record = read_run(tmp_path / "skip", config.run_id)
        reasons = {skip["client"]: skip["reason"] for skip in record["skipped"]}
        assert list(reasons) == [1, 2, 3, 4] and time.monotonic() - start < END_SECONDS
        assert "MemoryError: no room" in reasons[1] and "checksum" in reasons[2]
        assert "Flower's error" in reasons[3] or "no reply" in reasons[3]
        assert "no reply" in reasons[4]
        federation.end("client_4", signal.SIGKILL)  # it sleeps for an hour
        federation.start_node(4)
        strict = replace(config, on_client_failure="abort")
        with pytest.raises(ClientFailure, match="round 0, client 1: Refused: MemoryError: no room"):
            federation.wait(federation.submit(strict, tmp_path / "abort", **PATIENT), END_SECONDS)
        assert read_run(tmp_path / "abort", strict.run_id) is None


def wait_for(condition, seconds=END_SECONDS):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_supernode_and_a_superlink_are_killed_and_the_run_goes_on_to_the_same_bits(tmp_path):
    config = tiny_config(method="feddst", preset="repo", mask_interval=1, rounds=4, **SMALL)
    results = tmp_path / "there"
    checkpoint = results / f"{config.run_id}.flower.checkpoint"
    with Federation(tmp_path / "home", 3, "deployment") as federation:
        submitted = federation.submit(config, results, **PATIENT)
        wait_for(checkpoint.exists)
        federation.end("client_1", signal.SIGKILL)
        with pytest.raises(ClientFailure, match="client 1: "):
            federation.wait(submitted, END_SECONDS)
        assert read_run(results, config.run_id) is None
        federation.start_node(1)
        before = checkpoint.read_bytes()
        submitted = federation.submit(config, results, **PATIENT)
        wait_for(lambda: not checkpoint.exists() or checkpoint.read_bytes() != before)
        os.killpg(federation.running["superlink"].pid, signal.SIGKILL)
        with pytest.raises(ClientFailure, match="the superlink ended with status -9"):
            federation.wait(submitted, 60)
        federation.start_superlink()
        federation.wait(federation.submit(config, results, **PATIENT), END_SECONDS)
    run(config, results_dir=tmp_path / "here", progress=False)
    assert fingerprint(results, config.run_id) == fingerprint(tmp_path / "here", config.run_id)


def test_only_supernodes_whose_keys_are_known_are_let_in_and_only_over_tls(tmp_path):
    config = tiny_config(rounds=1, **SMALL)
    keys = tmp_path / "keys"
    subprocess.run([sys.executable, str(ROOT / "tools" / "certificates.py"), str(keys), "4"], check=True)
    with Federation(tmp_path / "home", 3, "deployment", security=keys) as federation:
        federation.wait(federation.submit(config, tmp_path / "there", **PATIENT), END_SECONDS)
        federation.end("client_2")
        (keys / "client_2").write_bytes((keys / "client_3").read_bytes())  # a key that nobody registered
        federation.start_node(2)
        other = replace(config, seed=1)
        with pytest.raises(ClientFailure, match=r"1 of 3 clients are not there after 60 s \(2\)"):
            federation.wait(
                federation.submit(other, tmp_path / "there", **{**PATIENT, "join_timeout": 60.0}), END_SECONDS
            )
    run(config, results_dir=tmp_path / "here", progress=False)
    assert fingerprint(tmp_path / "there", config.run_id) == fingerprint(tmp_path / "here", config.run_id)


def test_a_run_that_is_there_costs_nothing(tmp_path):
    config = tiny_config(rounds=1, **SMALL)
    run(config, results_dir=tmp_path, progress=False)
    start = time.monotonic()
    launch(config, tmp_path, "simulation")
    assert time.monotonic() - start < 1 and not (tmp_path / ".flower").exists()
    assert json.loads((tmp_path / f"{config.run_id}.json").read_text())["run_id"] == config.run_id
