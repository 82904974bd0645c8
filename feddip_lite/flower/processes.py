"""A Flower federation on this machine, from start to end: every process is ours, and the exit status is honest.

`flwr run` says 0 whatever became of the run, starts a server that stays, and waits for ever for a node that is gone. So
`launch` starts the processes itself (simulation: one; deployment: a superlink and a supernode per client), submits the
run, waits for what the server app says of it, checks the result, and ends all that it started. Read next: `server.py`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from ..config import Config
from ..core.errors import ClientFailure
from ..plugins import VARIABLE
from ..records.store import read_run

APP = Path(__file__).parent / "app"
ENGINES = ("simulation", "deployment")
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONUNBUFFERED": "1",
}
COLOURS = {"FORCE_COLOR", "CLICOLOR_FORCE", "CLICOLOR"}  # a notebook's kernel asks for them, and has them in JSON
START_SECONDS = 120.0  # for a superlink to answer
ASK_SECONDS = 30.0  # between two questions to the superlink whether the run has ended
GRACE_SECONDS = 10.0  # between asking a process to end and ending it


def launch(config: Config, results: str | Path, engine: str, *, time_limit: float = 86400.0, **options) -> None:
    """Run `config` on Flower on this machine and record it in `results`, as `train.run.run` does in one process.

    Args:
        engine: "simulation" (one host, clients are jobs of Ray) or "deployment" (a supernode per client, TLS off,
            because nothing leaves this machine).
        time_limit: seconds after which everything is ended.
        options: of `Federation.submit`.

    Raises:
        ClientFailure: the run failed, or did not end in time; says why. What was done is in the checkpoint.
        ValueError: bad input; `engine` or the folder in use.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: {engine!r} is not valid; expected one of {', '.join(ENGINES)}")
    results = Path(results).resolve()
    if read_run(results, config.run_id):
        return
    with Federation(results / ".flower", config.clients, engine) as federation:
        federation.wait(federation.submit(config, results, **options), time_limit)


class Federation:
    """The processes of a federation on this machine; a context manager.

    Args:
        home: folder for Flower's files, logs and the clients' memories; one federation at a time.
        node: further configuration of a client's supernode, as in `flower-supernode --node-config`.
        security: folder of `tools/certificates.py`: TLS, and only the supernodes whose keys are there are let in.
            None = neither, for loopback only.
    """

    def __init__(
        self, home: Path, clients: int, engine: str, node: Callable[[int], Mapping] = lambda client: {},
        security: Path | None = None,
    ):  # fmt: skip
        self.home, self.clients, self.engine, self.node, self.security = home, clients, engine, node, security
        self.running: dict[str, subprocess.Popen] = {}
        self.port = free_port()

    def __enter__(self) -> Federation:
        self.home.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.home / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{self.home}: another federation is running in this folder; wait, or use another"
            ) from None
        try:
            (self.home / "superlink.db").unlink(missing_ok=True)
            self.start_superlink()
            if self.engine == "simulation":
                size = ("--num-supernodes", str(self.clients), "--client-resources-num-cpus", "1")
                self.flwr("federation", "simulation-config", "@none/default", "own", *size)
            else:
                for client in range(self.clients):
                    self.start_node(client)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for name in reversed(list(self.running)):
            self.end(name)
        self._lock.release()

    def start_superlink(self) -> None:
        """Start it, wait until it answers, and tell it whose keys are good."""
        secure = self.security and f'root-certificates = "{self.security}/ca.crt"'
        connection = f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{self.port}"\n'
        (self.home / "config.toml").write_text(connection + (secure or "insecure = true") + "\n")
        # A superlink that forgets its nodes when it is restarted sends them away, and they end.
        kind = ["--simulation"] if self.engine == "simulation" else ["--database", str(self.home / "superlink.db")]
        if self.security:
            files = {"ssl-ca-certfile": "ca.crt", "ssl-certfile": "server.pem", "ssl-keyfile": "server.key"}
            kind += ["--enable-supernode-auth"]
            kind += [word for option, file in files.items() for word in (f"--{option}", str(self.security / file))]
        else:
            kind += ["--insecure"]
        self.start("superlink", "flower-superlink", "--port", str(self.port), *kind)
        deadline = time.monotonic() + START_SECONDS
        while not _answers(self.port):
            if self.running["superlink"].poll() is not None or time.monotonic() > deadline:
                raise ClientFailure(f"the superlink did not start; see {self.home}/superlink.log")
            time.sleep(0.2)
        for client in range(self.clients if self.security else 0):
            self.flwr("supernode", "register", str(self.security / f"client_{client}.pub"), "own")

    def start_node(self, client: int) -> None:
        """Start the supernode of a client, with nothing but its number, its own folder, and what `node` adds."""
        own = {
            "partition-id": client, "num-partitions": self.clients,
            "memories": str(self.home / "clients" / str(client)), **self.node(client),
        }  # fmt: skip
        words = ["--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())]
        words += ["--node-config", " ".join(f"{name}={json.dumps(value)}" for name, value in own.items())]
        if self.security:
            key = str(self.security / f"client_{client}")
            words += ["--root-certificates", str(self.security / "ca.crt"), "--auth-supernode-private-key", key]
        else:
            words += ["--insecure"]
        self.start(f"client_{client}", "flower-supernode", *words)

    def submit(
        self, config: Config, results: Path, *, checkpoint_every: int = 1, join_timeout: float = 300.0,
        reply_timeout: float = 600.0,
    ) -> dict:  # fmt: skip
        """Hand the run to the superlink. Returns what `wait` needs.

        Args:
            checkpoint_every: rounds; with more than 1 a server may go back further than its clients remember.
            join_timeout, reply_timeout: seconds to wait for the whole federation, and for a round's replies.
        """
        outcome = self.home / "outcome.json"
        outcome.unlink(missing_ok=True)
        settings = {
            "config": json.dumps(asdict(config)), "results": str(results), "outcome": str(outcome),
            "checkpoint-every": checkpoint_every, "join-timeout": join_timeout, "reply-timeout": reply_timeout,
        }  # fmt: skip
        path = self.home / "settings.toml"
        path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
        number = json.loads(self.flwr("run", str(APP), "own", "--format", "json", "-c", str(path)))["run-id"]
        return {"config": config, "results": results, "outcome": outcome, "number": str(number)}

    def wait(self, run: Mapping, time_limit: float) -> None:
        """Wait until the run has ended. Raises ClientFailure or ValueError as its server did, or when time is up."""
        deadline, asked = time.monotonic() + time_limit, time.monotonic()
        while not run["outcome"].exists():
            if (status := self.running["superlink"].poll()) is not None:
                raise ClientFailure(f"the superlink ended with status {status}; see {self.home}/superlink.log")
            if time.monotonic() > deadline:
                raise ClientFailure(
                    f"time limit: the run did not end within {time_limit:g} s; the same command goes on"
                )
            if time.monotonic() > asked + ASK_SECONDS:
                listed = json.loads(self.flwr("list", "own", "--run-id", run["number"], "--format", "json"))["runs"]
                if listed[0]["status"].startswith("finished") and not run["outcome"].exists():
                    raise ClientFailure(f"the server app ended without a result; see {self.home}/superlink.log")
                asked = time.monotonic()
            time.sleep(0.2)
        said = json.loads(run["outcome"].read_bytes())
        if said["status"]:
            raise (ValueError if said["status"] == 2 else ClientFailure)(said["line"])
        if not read_run(run["results"], run["config"].run_id):
            raise ClientFailure(f"the server app says that the run is done, but {run['results']} does not hold it")

    def flwr(self, *words: str) -> str:
        """The output of a command of Flower's. Raises ClientFailure with its last line if it fails."""
        command = [_program("flwr"), *words]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=self._environment(), cwd=self.home, timeout=START_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise ClientFailure(f"flwr {words[0]}: no answer within {START_SECONDS:g} s") from None
        if done.returncode:
            raise ClientFailure(f"flwr {words[0]}: {' '.join((done.stderr or done.stdout).split())[-500:]}")
        return done.stdout

    def start(self, name: str, program: str, *words: str) -> None:
        """Start a process in a group of its own; what it prints is in `<home>/<name>.log`."""
        with open(self.home / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                [_program(program), *words], stdout=log, stderr=log, env=self._environment(), cwd=self.home,
                start_new_session=True,
            )  # fmt: skip

    def end(self, name: str, how: int = signal.SIGTERM) -> None:
        """End a process and all that it started: asked first (unless `how` is SIGKILL), then made to."""
        process = self.running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        inherited = {name: value for name, value in os.environ.items() if name not in COLOURS}
        if VARIABLE in inherited:  # plugins are found from where the command was called
            inherited["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), inherited.get("PYTHONPATH", "")])
        return {**inherited, **ENVIRONMENT, "PATH": path, "FLWR_HOME": str(self.home)}


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _program(name: str) -> str:
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise ValueError(f"{name} is not installed; run: make flower, or pip install 'feddip-lite[flower]'")
    return str(path)
