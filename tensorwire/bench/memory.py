"""Sending a model once, from one process to another over loopback TCP: memory beyond the model, and time.

    regular    the whole message is built, sent, received, and only then decoded
    container  tensors are encoded and decoded frame by frame; the receiver knows the schema and keeps them
    file       a .safetensors file is streamed through the codec into another one; nobody holds the model

`sender_extra_mib` is the peak resident memory during the transfer beyond the level right before it (model
loaded, imports done, connected); `receiver_extra_mib` likewise, less the model it is meant to end up holding
(in file mode: nothing). `seconds` run from the sender's first step to the receiver's word that all is there
and verified; in file mode that includes putting the file on disk (fsync). Of several runs, the largest peaks
and the median time count. `torch.save` and `safetensors` are rivals in regular mode, used as their users use them.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median
from typing import Any, Final

import tensorwire
from tensorwire.bench.machine import available_memory
from tensorwire.bench.models import MIB, Model, default, resolve
from tensorwire.bench.options import BenchError, Note, Options
from tensorwire.bench.tables import Column, Row

DEFAULT_CODECS: Final = ("raw", "bf16", "int8", "nf4")
_RIVALS: Final = {"torch.save": "torch", "safetensors": "safetensors"}
_SPARE: Final = 512 * MIB  # for two interpreters and their libraries
COLUMNS: Final = (
    Column("mode", "mode"),
    Column("codec", "codec"),
    Column("model_mib", "model", ".1f"),
    Column("sender_extra_mib", "sender", ".1f"),
    Column("receiver_extra_mib", "receiver", ".1f"),
    Column("seconds", "s", ".2f"),
    Column("mib_per_second", "MiB/s", ".0f"),
)


def title(rows: list[Row]) -> str:
    """What stands above the table."""
    return f"sending {rows[0]['model']} between two processes: peak memory beyond the model, MiB"


def run(options: Options, note: Note) -> Iterator[Row]:
    """One row a mode and codec, and one a rival in regular mode."""
    name = options.model or default()
    model = resolve(name)
    with tempfile.TemporaryDirectory(prefix="tensorwire-bench-") as folder:
        for mode in options.modes:
            source = _source(model, folder) if mode == "file" else name
            for codec in options.codecs or DEFAULT_CODECS:
                yield from _row(model, source, mode, mode, codec, folder, options, note)
            for rival, package in _RIVALS.items() if mode == "regular" else ():
                if importlib.util.find_spec("torch") and importlib.util.find_spec(package):
                    yield from _row(model, source, mode, rival, rival, folder, options, note)
                else:
                    note(f"{rival} left out: not installed")


def _row(
    model: Model, source: str, mode: str, method: str, codec: str, folder: str, options: Options, note: Note
) -> Iterator[Row]:
    problem = _does_not_fit(model, mode, method, codec)
    if problem:
        note(f"{mode} {codec} left out: {problem}")
        return
    target = os.path.join(folder, "received.safetensors")
    job = {"method": method, "codec": codec, "model": source}
    tensors = [(name, view.dtype.name, view.shape) for name, view in model.tensors.items()]
    runs = []
    for _ in range(options.repeat):
        try:
            runs.append(transfer(job | {"path": source}, job | {"path": target, "tensors": tensors}))
        except BenchError as error:
            note(f"{mode} {codec} left out: {error}")
            return
        if mode == "file":
            os.unlink(target)
    seconds = median(sender["seconds"] for sender, _ in runs)
    kept = 0 if mode == "file" else model.nbytes
    yield {
        "suite": "memory",
        "model": model.name,
        "mode": mode,
        "codec": codec,
        "model_mib": model.nbytes / MIB,
        "sender_extra_mib": max(sender["extra"] for sender, _ in runs) / MIB,
        "receiver_extra_mib": (max(receiver["extra"] for _, receiver in runs) - kept) / MIB,
        "seconds": seconds,
        "mib_per_second": model.nbytes / MIB / seconds,
    }


def transfer(sender_job: dict[str, Any], receiver_job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run both processes; what each of them reported. Raises BenchError when one of them fails."""
    with ExitStack() as stack:
        receiver = stack.enter_context(_Peer(receiver_job | {"role": "receive"}))
        port = receiver.result()["port"]
        sender = stack.enter_context(_Peer(sender_job | {"role": "send", "port": port}))
        try:
            sent = sender.result()
        except BenchError as error:
            # Either may be the cause of the other. A receiver that still waits for a connection is not.
            raise BenchError(f"{error}; {receiver.last_words()}" if receiver.failed else str(error)) from None
        return sent, receiver.result()


class _Peer:
    """A process of peer.py; killed on the way out if it still runs."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tensorwire.bench.peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Not the working directory first: it may hold the sources, without the extension.
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        self._role = job["role"]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job))
        self._process.stdin.close()

    def __enter__(self) -> "_Peer":
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not well."""
        return bool(self._process.poll())

    def result(self) -> dict[str, Any]:
        """The next line that the process reports."""
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if line:
            result: dict[str, Any] = json.loads(line)
            return result
        raise BenchError(self.last_words())

    def last_words(self) -> str:
        """Why it ended."""
        assert self._process.stderr is not None
        lines = self._process.stderr.read().strip().splitlines()
        killed = f"exit code {self._process.wait()}"
        return f"the process to {self._role} failed: {lines[-1] if lines else killed}"


def _source(model: Model, folder: str) -> str:
    """The model as a `.safetensors` file: its own, or one written for the occasion."""
    needed = model.nbytes * (1 if model.path else 2)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BenchError(f"file mode needs {_gib(needed)} in {folder}, {_gib(free)} are free; set TMPDIR")
    if model.path:
        return model.path
    path = os.path.join(folder, "source.safetensors")
    tensorwire.safetensors.decode(model.encode(), path)
    return path


def _does_not_fit(model: Model, mode: str, method: str, codec: str) -> str | None:
    """Why this run would not fit into memory, sender and receiver together; None if it does."""
    available = available_memory()
    if available is None or mode == "file":
        return None
    needed = 2 * model.nbytes + _SPARE
    if mode == "regular":
        message = model.stream_size(codec).total if method == mode else model.nbytes
        # The sender's pieces and their join (raw pieces are the model itself), and what the receiver got.
        needed += message * (2 if method != mode or tensorwire.codec(codec).in_place else 3)
    if needed <= available:
        return None
    return f"both processes together need {_gib(needed)}, {_gib(available)} are available"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
