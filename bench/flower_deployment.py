"""Flower's deployment engine on this machine: a SuperLink, SuperNodes, and the run of an app.

Used by bench/flower_round.py and tests/engines/test_flower.py. Started within a network namespace of its own
(`unshare -rn`), the bytes of its loopback interface are those of the engine's sockets and no others.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

BIN = Path(sys.executable).parent
SETTINGS = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
# Of each process, by what stands in its command line, what it is called here.
ROLES = {
    "flwr-serverapp": "ServerApp",
    "flwr-clientapp": "ClientApp",
    "flower-supernode": "SuperNode",
    "flower-superlink": "SuperLink",
}


def is_alone_on_loopback():
    """Whether this network has a loopback interface and nothing else."""
    return {name for _, name in socket.if_nameindex()} == {"lo"}


def free_port():
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


@contextmanager
def deployment(folder, nodes=2, *, address="127.0.0.1", prefix=()):
    """A SuperLink and so many SuperNodes; gives the environment in which `run` finds them. Logs are in `folder`.

    `address`: that of the SuperLink, as all see it. `prefix`: of its command, such as `ip netns exec NAME`.
    """
    port = free_port()
    home = home_of(folder)
    home.mkdir(parents=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}:{port}"\ninsecure = true\n'
    )
    environment = {**os.environ, **SETTINGS, "FLWR_HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with ExitStack() as stack:

        def start(name, *command):
            log = stack.enter_context((Path(folder) / f"{name}.log").open("w"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            stack.callback(stop, process)

        start(
            "superlink", *prefix, BIN / "flower-superlink", "--insecure", "--host", address, "--port", str(port),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        wait_for(address, port)
        for number in range(nodes):
            start(
                f"supernode-{number}", BIN / "flower-supernode", "--insecure", "--superlink", f"{address}:{port}",
                "--port", str(free_port()), "--node-config", f"partition-id={number} num-partitions={nodes}",
            )  # fmt: skip
        yield environment


def home_of(folder):
    """Flower's own folder, whose name is in the environment of each of its processes and of no others."""
    return Path(folder) / "home"


def stop(process):
    """End a process and those that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def wait_for(address, port, seconds=60):
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), 1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def run(app, environment, *, config, timeout=300):
    """Run an app to its end and return its log. Raises RuntimeError where that tells of an error."""
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    command = [BIN / "flwr", "run", str(app), "--stream", *(["--run-config", pairs] if config else [])]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as log:
        watch = threading.Timer(timeout, log.kill)
        watch.start()
        lines = log.communicate()[0]
        watch.cancel()
    if log.returncode or "ERROR" in lines or "and 0 failures" not in lines:
        raise RuntimeError(f"the run has not come to a good end:\n{lines[-8000:]}")
    return lines


def written(folder):
    """What the app of a run has written to `result.json`."""
    return json.loads((Path(folder) / "result.json").read_text())


class Peaks(threading.Thread):
    """What the processes of the deployment in a folder take, sampled 20 times a second.

    `most`: the most memory that a process of each kind has held, anonymous and shared pages, and all together.
    `processor_seconds`: of all of them together, which other programs on the machine hardly change.
    """

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.most = {}
        self._mark = f"FLWR_HOME={home_of(folder)}".encode()
        self._ticks = {}
        self._ended = threading.Event()

    def run(self):
        while not self._ended.wait(0.05):
            held = {}
            for path in Path("/proc").iterdir():
                if path.name.isdecimal():
                    self._look(path, held)
            for role, sizes in held.items():
                self.most[role] = max(self.most.get(role, 0), *sizes)
            total = sum(sum(sizes) for sizes in held.values())
            self.most["total"] = max(self.most.get("total", 0), total)

    @property
    def processor_seconds(self):
        return sum(self._ticks.values()) / os.sysconf("SC_CLK_TCK")

    def _look(self, path, held):
        try:
            command = (path / "cmdline").read_bytes().decode(errors="replace")
            role = next((role for mark, role in ROLES.items() if mark in command), None)
            if role is None or self._mark not in (path / "environ").read_bytes().split(b"\0"):
                return
            status = dict(line.split(":", 1) for line in (path / "status").read_text().splitlines())
            pages = sum(int(status[key].split()[0]) for key in ("RssAnon", "RssShmem"))
            held.setdefault(role, []).append(pages * 1024)
            times = (path / "stat").read_text().rpartition(")")[2].split()
            self._ticks[path.name, times[19]] = int(times[11]) + int(times[12])  # by number and start
        except (OSError, KeyError, ValueError):  # it has ended
            return

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception):
        self._ended.set()
        self.join()
