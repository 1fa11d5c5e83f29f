"""A round of NVIDIA FLARE over a slow link, without training: plain and with tensorwire, in turns.

    python bench/nvflare_link.py --link ./slow-link --size-mb 64

Needs nvflare in the environment. `--link` is a command that runs two others at the ends of a link: `LINK -- SERVER --
SITES`, the server's end having the address of `--address`, and that ends when the second does. Two network namespaces
with a veth pair between them and `tc qdisc add dev ... root netem delay 50ms rate 100mbit` on each end are such a link.
At one end runs a provisioned server, at the other both sites, which share the link; without TLS, whose cost is not what
is measured. `seconds`: the median of all rounds but the first, as in bench/nvflare_round.py, whose job this is.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nvflare_round import recipe, round_seconds

VARIANTS = ("plain", "float16", "wire")
PATIENCE = 60.0  # seconds for processes of FLARE to start or to end
ADMIN = "admin@bench.org"
SITES = ("site-1", "site-2")
ALLOWED = ("nvflare_round.", "tensorwire.integrations.nvflare.")
_PROJECT = """\
api_version: 3
name: bench
description: one server, two sites
participants:
  - {{name: {address}, type: server, org: bench, fed_learn_port: 8002, admin_port: 8003, connection_security: clear}}
  - {{name: site-1, type: client, org: bench, connection_security: clear}}
  - {{name: site-2, type: client, org: bench, connection_security: clear}}
  - {{name: {admin}, type: admin, org: bench, role: project_admin, connection_security: clear}}
builders:
  - path: nvflare.lighter.impl.workspace.WorkspaceBuilder
    args: {{template_file: [master_template.yml]}}
  - path: nvflare.lighter.impl.static_file.StaticFileBuilder
    args: {{config_folder: config}}
  - path: nvflare.lighter.impl.cert.CertBuilder
  - path: nvflare.lighter.impl.signature.SignatureBuilder
"""


def provision(folder: Path, address: str) -> Path:
    """The startup kits of all, which keep what they store in `folder`."""
    (folder / "project.yml").write_text(_PROJECT.format(address=address, admin=ADMIN))
    command = [str(Path(sys.executable).with_name("nvflare")), "provision", "-p", "project.yml", "-w", "kits"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    kits = folder / "kits" / "bench" / "prod_00"
    for name in (address, *SITES):
        local = kits / name / "local"
        text = (local / "resources.json.default").read_text().replace("/tmp/nvflare", str(folder / "store"))
        resources = json.loads(text)
        resources["class_allow_list"] += ALLOWED
        (local / "resources.json").write_text(json.dumps(resources))
    return kits


def start(kit: Path, role: str, *settings: str) -> subprocess.Popen[bytes]:
    """A server or site, with what it says in a file beside its kit."""
    module = {"server": "server.server_train", "client": "client.client_train"}[role]
    command = [
        sys.executable,
        "-u",
        "-m",
        f"nvflare.private.fed.app.{module}",
        "-m",
        str(kit),
        "-s",
        f"fed_{role}.json",
    ]
    command += ["--set", "secure_train=true", "org=bench", "config_folder=config", *settings]
    with open(kit.parent / f"{kit.name}.out", "wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)


def serve(options: argparse.Namespace) -> None:
    """The server's end: runs the job, and leaves what it measured in the folder."""
    from nvflare.recipe.prod_env import ProdEnv

    folder = Path(options.folder)
    kits = provision(folder, options.address)
    server = start(kits / options.address, "server")
    (folder / "ready").touch()
    environment = ProdEnv(str(kits / ADMIN), login_timeout=PATIENCE, username=ADMIN)
    before = carried()
    run = recipe(options.serve, options.size_mb, options.rounds).execute(environment)
    run.get_result()
    moved = carried() - before
    server.terminate()
    text = (kits / f"{options.address}.out").read_text()
    if "Finished FedAvg" in text:
        seconds = [round_seconds(text, number) for number in range(1, options.rounds)]
        mb = round(moved / options.rounds / 1e6, 1)
        result = {"seconds": round(statistics.median(seconds), 2), "each": seconds, "mb": mb}
    else:
        result = {"failed": text[-5000:]}
    (folder / "measured").write_text(json.dumps(result))
    (folder / "measured").rename(folder / "result")  # which the sites wait for


def sites(options: argparse.Namespace) -> None:
    """The other end: two sites, until the server has its result."""
    folder = Path(options.folder)
    wait_for(folder / "ready", PATIENCE)
    kits = folder / "kits" / "bench" / "prod_00"
    running = [start(kits / name, "client", f"uid={name}") for name in SITES]
    wait_for(folder / "result", options.patience)
    for process in running:
        process.terminate()


def wait_for(path: Path, seconds: float) -> None:
    over = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > over:
            sys.exit(f"there is no {path} after {seconds} seconds")
        time.sleep(0.2)


def carried() -> int:
    """Bytes that the link has brought to this end and taken from it; not those of the loopback."""
    lines = [line for line in Path("/proc/net/dev").read_text().splitlines() if ":" in line and " lo:" not in line]
    columns = [line.split(":")[1].split() for line in lines]
    return sum(int(fields[0]) + int(fields[8]) for fields in columns)


def measure(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        common = ["--folder", folder, "--address", options.address, "--size-mb", str(options.size_mb)]
        common += ["--rounds", str(options.rounds), "--patience", str(options.patience)]
        ends = [[sys.executable, __file__, *end, *common] for end in (["--serve", variant], ["--sites"])]
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        subprocess.run(
            [*shlex.split(options.link), "--", *ends[0], "--", *ends[1]],
            env={**os.environ, "PYTHONPATH": path},
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,  # what FLARE says of a job while it runs
        )
        return {"variant": variant, **json.loads((Path(folder) / "result").read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--link", help="the command that makes the link, as above")
    parser.add_argument("--address", default="10.77.0.2", help="of the server's end")
    parser.add_argument("--size-mb", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--patience", type=float, default=900.0, help="seconds that a job may take")
    parser.add_argument("--variants", nargs="+", default=["plain", "wire"], choices=VARIANTS)
    parser.add_argument("--serve", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--sites", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
    elif options.sites:
        sites(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    from tensorwire.bench.machine import describe

    print(describe())
    for _ in range(options.turns):
        for variant in options.variants:
            print(json.dumps(measure(variant, options)), flush=True)


if __name__ == "__main__":
    main()
