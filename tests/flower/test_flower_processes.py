"""Laws of the processes behind `--on`: an honest end, in time, with nothing left. Flower's programs are played by
scripts, so that nothing of Flower is needed; test_flower_machines.py has the real ones."""

import ast
import functools
import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environment, flags, tiny_config

from feddip_lite import Config
from feddip_lite.__main__ import main
from feddip_lite.core.errors import ClientFailure
from feddip_lite.core.models import empty_model
from feddip_lite.flower import processes as flower_run
from feddip_lite.flower.processes import APP, Federation, launch

SUPERLINK = """
import os, socket, subprocess, sys, time
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
open("pids", "a").write(f"{os.getpid()} {child.pid}\\n")
server = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
while not os.path.exists("die"):
    time.sleep(0.05)
sys.exit(3)
"""
SUPERNODE = """
import sys, time
print(sys.argv)
time.sleep(600)
"""
FLWR = """
import json, os, sys, tomllib
json.dump(dict(os.environ), open("environment.json", "w"))
if sys.argv[1] == "run":
    story = open("story").read()
    said = {"fails": (1, "round 0, client 1: no"), "refuses": (2, "rounds: 0"), "lies": (0, "")}.get(story)
    if said:
        settings = tomllib.load(open(sys.argv[-1], "rb"))
        json.dump(dict(zip(("status", "line"), said)), open(settings["outcome"], "w"))
    if story == "dies":
        open("die", "w")
    print(json.dumps({"run-id": 7}))
if sys.argv[1] == "list":
    status = "finished:completed" if open("story").read() == "vanishes" else "running"
    print(json.dumps({"runs": [{"status": status}]}))
"""


def test_a_run_in_one_process_knows_nothing_of_flower():
    code = "import sys, feddip_lite.__main__, feddip_lite.flower.processes; sys.exit('flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


def test_the_app_has_the_files_of_a_flower_baseline_and_its_readme_the_defaults():
    files = {path.name for path in (APP / "feddip_app").glob("*.py")}
    names = ("client_app", "server_app", "strategy", "dataset", "model", "utils", "__init__")
    assert files == {f"{name}.py" for name in names}
    readme, usual = (APP / "README.md").read_text(), Config().resolved()
    assert readme.startswith("---\ntitle:") and all(f"\n{key}: " in readme for key in ("url", "labels", "dataset"))
    assert f"| {usual.clients}, {usual.clients_per_round} |" in readme
    assert f"| {usual.rounds}, {usual.local_epochs}, {usual.batch_size} |" in readme
    for title, (model, channels, size, classes) in {
        "LeNet-5": ("lenet5", 1, 28, 10), "AlexNet": ("alexnet", 3, 32, 10), "ResNet-18": ("resnet18", 3, 32, 100)
    }.items():  # fmt: skip
        module = empty_model(model, None, classes=classes, width=1.0, channels=channels, size=size, device="meta")
        count = sum(parameter.numel() for parameter in module.parameters())
        assert f"| {title} | {count:,} |".replace(",", " ") in readme


def test_the_app_imports_what_is_there():
    trees = [ast.parse(path.read_text()) for path in (APP / "feddip_app").glob("*.py")]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    ours = {node.module for node in imports if node.module.startswith("feddip_lite")}
    assert ours and all(importlib.util.find_spec(name) for name in ours)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home of a federation whose programs are the scripts above."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"flower-superlink": SUPERLINK, "flower-supernode": SUPERNODE, "flwr": FLWR}.items():
        (folder / name).write_text(f"#!{sys.executable}\n{text}")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setattr(flower_run, "_program", lambda name: str(folder / name))
    monkeypatch.setattr(flower_run, "ASK_SECONDS", 0.1)
    monkeypatch.setattr(flower_run, "GRACE_SECONDS", 1.0)
    home = tmp_path / "results" / ".flower"
    home.mkdir(parents=True)
    return home


COMMAND = """
import sys
from feddip_lite.flower import processes as flower_run
from feddip_lite.__main__ import main
flower_run._program = lambda name: f"{sys.argv[1]}/bin/{name}"
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("how, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_asked_to_end_leaves_nothing(how, status, home, tmp_path):
    (home / "story").write_text("never ends")
    words = ["run", *flags(), "--quiet", "--on", "simulation", "--results", str(home.parent)]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    program = [sys.executable, "-c", COMMAND, str(tmp_path), *words]
    command = subprocess.Popen(program, env=environment(), preexec_fn=heed)
    deadline = time.monotonic() + 60
    while not (home / "settings.toml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    command.send_signal(how)
    assert command.wait(60) == status
    assert not any(alive(int(pid)) for pid in (home / "pids").read_text().split())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


STORIES = {
    "fails": (ClientFailure, "round 0, client 1: no"),
    "refuses": (ValueError, "rounds: 0"),
    "lies": (ClientFailure, "does not hold it"),
    "vanishes": (ClientFailure, "ended without a result"),
    "dies": (ClientFailure, "the superlink ended with status 3"),
    "never ends": (ClientFailure, "did not end within 2 s"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("story", STORIES)
def test_every_end_is_told_and_nothing_is_left(story, home):
    (home / "story").write_text(story)
    kind, reason = STORIES[story]
    with pytest.raises(kind, match=reason):
        launch(tiny_config(clients=3), home.parent, "deployment", time_limit=2)
    started = [int(pid) for pid in (home / "pids").read_text().split()]
    assert len(started) == 2
    deadline = time.monotonic() + 5
    while any(map(alive, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, started))


def test_flower_tells_nobody_installs_nothing_and_writes_nothing_at_home(home, monkeypatch):
    for name in flower_run.COLOURS:
        monkeypatch.setenv(name, "1")
    (home / "story").write_text("fails")
    with pytest.raises(ClientFailure):
        launch(tiny_config(clients=3), home.parent, "simulation")
    given = json.loads((home / "environment.json").read_text())
    assert given["FLWR_HOME"] == str(home) and not given.keys() & flower_run.COLOURS
    assert (given["FLWR_TELEMETRY_ENABLED"], given["RAY_USAGE_STATS_ENABLED"]) == ("0", "0")
    assert (given["FLWR_DISABLE_UPDATE_CHECK"], given["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"]) == ("1", "1")


def test_a_supernode_is_told_its_own_number_and_folder_and_nothing_of_the_others(home):
    with Federation(home, 3, "deployment", node=lambda client: {"folder": f"/data/{client}"}) as federation:
        deadline = time.monotonic() + 10
        while not (text := (home / "client_1.log").read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        federation.end("client_1", signal.SIGKILL)
    assert "partition-id=1 num-partitions=3" in text and 'folder="/data/1"' in text
    assert f'memories="{home}/clients/1"' in text and "/data/0" not in text and "/data/2" not in text


def test_one_federation_at_a_time_in_a_folder(home):
    with Federation(home, 1, "simulation"), pytest.raises(ValueError, match="another federation is running"):
        Federation(home, 1, "simulation").__enter__()


def test_the_command_line_names_engines_and_the_missing_extra(tmp_path, monkeypatch, capsys):
    command = ["run", *flags(), "--results", str(tmp_path), "--quiet"]
    assert main([*command, "--on", "mars"]) == 2
    assert "engine: 'mars' is not valid; expected one of simulation, deployment" in capsys.readouterr().err
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert main([*command, "--on", "simulation"]) == 2
    assert "flower-superlink is not installed; run: make flower" in capsys.readouterr().err
