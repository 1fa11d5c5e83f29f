"""A step of fine-tuning on its way from a trainer to a worker, beside sending all of the model again.

    python bench/fleet.py                                         # 5.7 GB, fp32, one step of Adam: takes 15 GB of disk
    python bench/fleet.py --layers 4 --dtype bfloat16             # the same with fewer layers
    python bench/fleet.py apply --layers 4                        # what applying costs beside reading the model once

Trainer, worker and web server are processes of their own, on loopback. The model has the shapes of llama-3.2-1b. Its
weights, and what a step makes of them, are those of all-MiniLM-L6-v2 in real fine-tuning (`tensorwire.bench.finetune`),
tile by tile: bits and changes are real, their order in the model is not. States are files that are mapped into memory,
so that they need not fit. `cpu`, `own`: processor time of trainer and worker, and the most memory of its own that each
took beside its state (RssAnon, 50 times a second). Each way ends when the worker's state holds the version, and
versions are compared by digest.
"""

import argparse
import http.server
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import urllib.request
from functools import partial
from pathlib import Path
from time import perf_counter, process_time, thread_time

import ml_dtypes
import numpy as np

import tensorwire
from tensorwire.bench import finetune, machine, models
from tensorwire.bench.shapes import llama
from tensorwire.dtypes import BY_NAME
from tensorwire.tensor import TensorView, ViewFront
from tensorwire.transports import TcpListener, TcpTransport

CHECKED = 1 << 20  # bytes that have a checksum of their own
PHASE = 1_000_003  # odd, so that tensors begin at different places of a tile
WARM_UP = 20  # steps before the first version, so that Adam knows the sizes of gradients
# What stands for the dtypes: bfloat16 as bits that tensorwire knows the name of.
NUMPY = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16, metadata={"tensorwire": "bfloat16"}),
}


def shapes(options):
    hidden = options.hidden
    return llama(
        vocabulary=options.vocabulary, hidden=hidden, layers=options.layers, feed_forward=4 * hidden,
        key_value=hidden // 4,
    )  # fmt: skip


def tiles(options):
    """Matrices of a real model before and after a step, one behind the other, as the dtype that is asked for."""
    path = Path(options.tiles) if options.tiles else None
    if path is None or not path.exists():
        made = trained(options.rate)
        if path is not None:
            with open(path, "wb") as file:
                np.save(file, made)
    else:
        made = np.load(path)
    if options.dtype == "float32":
        return made
    return made.astype(ml_dtypes.bfloat16).view(NUMPY["bfloat16"])


def trained(rate):
    """Two rows of float32: the weights before and after a step."""
    model = models.resolve(models.TRAINED)
    training = finetune.Training(model)
    names = [name for name, weight in training.weights.items() if weight.ndim == 2 and "embed" not in name]
    rows = []
    for steps in (WARM_UP, 1):
        training.run(steps, rate)
        rows.append(np.concatenate([training.weights[name].detach().numpy().reshape(-1) for name in names]))
    return np.stack(rows)


class State:
    """A model in a file that is mapped into memory, as arrays by name."""

    def __init__(self, path, options):
        dtype = options.dtype
        total = sum(int(np.prod(shape)) for shape in shapes(options).values())
        with open(path, "ab") as file:
            file.truncate(total * NUMPY[dtype].itemsize)
        self.flat = np.memmap(path, np.dtype(NUMPY[dtype].str), "r+")
        self.nbytes = self.flat.nbytes
        self.tensors = {}
        at = 0
        for name, shape in shapes(options).items():
            size = int(np.prod(shape))
            self.tensors[name] = np.asarray(self.flat[at : at + size]).view(NUMPY[dtype]).reshape(shape)
            at += size

    def fill(self, tile):
        for number, tensor in enumerate(self.tensors.values()):
            flat, done, at = tensor.reshape(-1), 0, number * PHASE % tile.size
            while done < flat.size:
                part = tile[at : at + flat.size - done]
                flat[done : done + part.size] = part
                done, at = done + part.size, 0


class Cost:
    """What a call takes of this process: processor time, and the most memory of its own over what it had before."""

    def __enter__(self):
        self._began = process_time()
        self._before = self.most = self._now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._over.set()
        self._thread.join()
        self.most -= self._before
        self.seconds = process_time() - self._began

    def _watch(self):
        while not self._over.wait(0.02):
            self.most = max(self.most, self._now())

    def _now(self):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


class Trainer:
    def __init__(self, folder, options):
        self.store = folder / "store"
        self.folder = folder
        self.state = State(folder / "trainer.bin", options)
        self.old, self.new = tiles(options)
        self.state.fill(self.old)
        self.publisher = tensorwire.versions.Publisher(self.store)

    def step(self):
        self.state.fill(self.new)
        return {"changed": float(np.count_nonzero(self.old != self.new) / self.old.size), "bytes": self.state.nbytes}

    def publish(self):
        done = self.publisher.publish(self.state.tensors)
        seconds = {"own copy" if phase == "apply" else phase: each for phase, each in done.seconds.items()}
        return {"bytes": done.anchor if done.patch is None else done.patch, **seconds}

    def close(self):
        self.publisher.close()
        return {}

    def digest(self):
        return tensorwire.digest(self.state.tensors)

    def send(self, port, codec):
        began = perf_counter()
        with TcpTransport.connect("127.0.0.1", port) as transport:
            transport.send(tensorwire.encode(self.state.tensors, codec=codec))
        return {"send": perf_counter() - began}

    def save(self):
        import safetensors.torch
        import torch

        began = perf_counter()
        with torch.no_grad():
            tensors = {name: _torch(array) for name, array in self.state.tensors.items()}
            safetensors.torch.save_file(tensors, self.store / "model.safetensors")
        return {"save": perf_counter() - began, "bytes": (self.store / "model.safetensors").stat().st_size}


class Worker:
    def __init__(self, folder, options):
        self.folder = folder
        self.state = State(folder / "worker.bin", options)
        self.subscriber = None
        self.listener = TcpListener()

    def fetch(self, url):
        if self.subscriber is None:
            self.subscriber = tensorwire.versions.Subscriber(url, staging=self.folder)
        staged = self.subscriber.fetch()
        staged.apply(self.state.tensors)
        return staged.seconds

    def digest(self):
        return tensorwire.digest(self.state.tensors)

    def port(self):
        return self.listener.port

    def receive(self):
        began = perf_counter()
        with self.listener.accept() as transport:
            source = transport.receive()
            for _ in tensorwire.decode(source, into=self.state.tensors):
                pass
        return {"receive": perf_counter() - began}

    def load(self, url):
        from safetensors import safe_open

        began = perf_counter()
        path = self.folder / "model.safetensors"
        urllib.request.urlretrieve(f"{url}/model.safetensors", path)
        fetched = perf_counter()
        with safe_open(path, "pt") as file:
            for name, array in self.state.tensors.items():
                _torch(array).copy_(file.get_tensor(name))
        path.unlink()
        return {"fetch": fetched - began, "load": perf_counter() - fetched}


def _torch(array):
    import torch

    if array.dtype == np.float32:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def serve(kind, folder, options, pipe):
    """A process that does what it is told, and says how much memory that took."""
    here = kind(folder, options)
    pipe.send(None)
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return
        with Cost() as cost:
            done = getattr(here, name)(*arguments)
        pipe.send((done, (cost.seconds, cost.most)))


class Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def show_files(folder, pipe):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=folder)) as server:
        pipe.send(server.server_port)
        server.serve_forever()


class Process:
    """Another process, which is told what to do."""

    def __init__(self, target, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self._process = context.Process(target=target, args=(*arguments, there), daemon=True)
        self._process.start()
        there.close()
        self.port = self.pipe.recv()

    def begin(self, *call):
        self.pipe.send(call)

    def end(self):
        return self.pipe.recv()

    def __call__(self, *call):
        self.begin(*call)
        return self.end()


def measured(options, folder):
    """A row for each way."""
    (folder / "store").mkdir()
    server = Process(show_files, folder / "store")
    url = f"http://127.0.0.1:{server.port}"
    trainer, worker = Process(serve, Trainer, folder, options), Process(serve, Worker, folder, options)

    def row(way, size, seconds, *costs):
        taken = {name: round(each, 3) for name, each in seconds.items() if each}
        cpu = [round(each, 2) for each, _ in costs]
        own = [round(most / 1e6) for _, most in costs]
        return {"suite": "fleet", "dtype": options.dtype, "way": way, "bytes": size} | {
            "seconds": round(sum(taken.values()), 3), "phases": taken, "cpu_s": cpu, "own_mb": own,
        }  # fmt: skip

    def version(way):
        published, own = trainer("publish")
        size = published.pop("bytes")
        fetched, other = worker("fetch", url)
        assert trainer("digest")[0] == worker("digest")[0], "the worker has another version"
        return row(way, size, published | fetched, own, other)

    yield version("a whole version")
    step, _ = trainer("step")
    print(f"{step['bytes'] / 1e9:.2f} GB of {options.dtype}; {step['changed']:.2%} of weights change", flush=True)
    yield version("patch")
    trainer("close")
    for path in (folder / "store").glob("*.tw"):
        path.unlink()
    for codec in ("raw", "nf4"):
        port, _ = worker("port")
        worker.begin("receive")
        began = perf_counter()
        _, own = trainer("send", port, codec)
        _, other = worker.end()
        seconds = perf_counter() - began
        yield row(codec, size_of(options, codec), {"send and receive": seconds}, own, other)
    saved, own = trainer("save")
    size = saved.pop("bytes")
    loaded, other = worker("load", url)
    assert trainer("digest")[0] == worker("digest")[0], "the worker has another version"
    yield row("safetensors", size, saved | loaded, own, other)


def size_of(options, codec):
    """Bytes of the whole model's stream."""
    dtype = BY_NAME[options.dtype]
    views = {name: TensorView(dtype, shape, lambda start, stop: b"") for name, shape in shapes(options).items()}
    return tensorwire.streams.stream_size(
        tensorwire.streams.flatten(views, ViewFront(), tensorwire.streams.rule(codec), tensorwire.Limits())
    ).total


def applying(options, folder):
    """What applying 1 % of changes takes, in turns with reading the model once, by processor time of one thread."""
    old, _ = tiles(options)
    state = State(folder / "state.bin", options)
    base = State(folder / "base.bin", options)
    for changed in ("in one place", "everywhere"):
        state.fill(old)
        base.fill(old)
        bits = state.flat.view(f"u{state.flat.itemsize}")
        if changed == "everywhere":
            bits[::100] += 1
        else:
            bits[: bits.size // 100] += 1
        patch = tensorwire.Patch.read(b"".join(tensorwire.encode(state.tensors, base=base.tensors)))
        read, applied = [], []
        for _ in range(options.rounds):
            bits[:] = base.flat.view(bits.dtype)
            read.append(seconds(partial(checksums, state.flat.view(np.uint8))))
            applied.append(seconds(partial(tensorwire.apply, patch, state.tensors)))
        yield {
            "suite": "fleet", "dtype": options.dtype, "way": f"apply, 1 % changed {changed}", "bytes": patch.size,
            "gb": state.nbytes / 1e9, "read_s": min(read), "apply_s": min(applied), "times": min(applied) / min(read),
        }  # fmt: skip


def checksums(memory):
    for start in range(0, memory.size, CHECKED):
        tensorwire.checksum.crc32c(memory[start : start + CHECKED])


def seconds(call):
    began = thread_time()
    call()
    return thread_time() - began


def line(row):
    if "times" in row:
        return f"{row['way']:<32} read {row['read_s']:.3f} s, apply {row['apply_s']:.3f} s: {row['times']:.2f} times"
    phases = ", ".join(f"{name} {each:.2f}" for name, each in row["phases"].items())
    cpu, own = (" and ".join(map(str, row[key])) for key in ("cpu_s", "own_mb"))
    taken = f"{row['way']:<16} {row['bytes'] / 1e6:>9,.1f} MB {row['seconds']:>7.2f} s"
    return f"{taken} ({phases}); cpu {cpu} s, own {own} MB"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["sync", "apply"], default="sync")
    parser.add_argument("--dtype", choices=NUMPY, default="float32")
    parser.add_argument("--layers", type=int, default=16, help="16: all of llama-3.2-1b, 5.7 GB in float32")
    parser.add_argument("--vocabulary", type=int, default=128256, help="less for a smaller model (128256)")
    parser.add_argument("--hidden", type=int, default=2048, help="less for a smaller model (2048)")
    parser.add_argument("--rate", type=float, default=1e-5, help="the learning rate of the step (1e-5)")
    parser.add_argument("--tiles", help="a file that keeps the trained weights from run to run")
    parser.add_argument("--rounds", type=int, default=3, help="of apply; the least counts (3)")
    parser.add_argument("--folder", help="where files go; they are removed (where temporary files go)")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    options = parser.parse_args()
    if not Path("/proc/self/status").exists():
        sys.exit("memory of a process's own is read as Linux shows it")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(machine.describe(), f"load {os.getloadavg()[0]:.1f}", sep="\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="fleet-", dir=options.folder) as made:
        for row in (applying if options.what == "apply" else measured)(options, Path(made)):
            print(json.dumps(row) if options.json else line(row), flush=True)
