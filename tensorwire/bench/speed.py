"""GB/s of fp32 input per codec, beside a copy and beside what a user would otherwise pick, in one run.

Every contender works on the same array of seeded weights. After one warm-up each, rounds go over all of them in turn,
so that other load on the machine meets all alike; a figure is the median of the rounds. Contenders that allocate have
rounds of their own, after the others: for some hundredths of a second after they free memory, the system and the host
of a virtual machine take it back, at the cost of whoever runs then.

`warm` outputs are written to memory that was in use before, `fresh` ones to new memory that the contender allocates.
`reused` ones are allocated too, as tensorwire does unless told otherwise: they get the memory of what the round before
dropped (`tensorwire.set_spare_memory`). memcpy is `np.copyto` of the same array into warm memory, each byte counted
once; vs_memcpy and vs_rival are ratios to figures of this run.

encode and decode are the codec alone, the checksum of what it encodes included, in one call that may use `threads`
threads; memcpy copies as many equal parts at once. encode_stream drains `tensorwire.encode` and decode_stream runs
`tensorwire.decode` from one message into an existing array, or into what it allocates: frames, checksums and Python
included.
"""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import tensorwire
from tensorwire import dtypes, kernels
from tensorwire.bench import rivals
from tensorwire.bench.models import MIB, Weights, view_of, weights
from tensorwire.bench.options import Note, Options
from tensorwire.bench.rivals import Contender
from tensorwire.bench.tables import Column, Row
from tensorwire.checksum import crc32c
from tensorwire.codecs import Codec, Take
from tensorwire.errors import counted
from tensorwire.memory import SPARE
from tensorwire.tensor import Extent

DEFAULT_CODECS: Final = ("fp16", "bf16", "int8", "int8-linear", "nf4", "fp4", "raw")
DEFAULT_SIZE_MIB: Final = {"native": 32, "numpy": 4}
ROUNDS: Final = 9
FEWER_ROUNDS: Final = 5  # for slow contenders
_SLOW: Final = 0.2  # seconds of a run, from which on a contender is slow
COLUMNS: Final = (
    Column("size_mib", "MiB"),
    Column("codec", "codec"),
    Column("op", "op"),
    Column("output", "output"),
    Column("impl", "by"),
    Column("gbps", "GB/s", ".2f"),
    Column("vs_memcpy", "of memcpy", ".3f"),
    Column("vs_rival", "of rival", ".2f"),
)


def title(rows: list[Row]) -> str:
    """What stands above the table."""
    threads = rows[0]["threads"]
    return f"speed with {counted(threads, 'thread')}, GB/s of fp32, medians of {ROUNDS} rounds"


def run(options: Options, note: Note) -> Iterator[Row]:
    """Rows for each size: memcpy first, then codec by codec."""
    if options.model is not None:
        note("speed measures seeded weights, whatever the model")
    codecs = [tensorwire.codec(spec) for spec in options.codecs or DEFAULT_CODECS]
    rivals.import_rivals(codecs, options.threads, note)
    before = kernels.get_threads()
    kernels.set_threads(options.threads)
    try:
        for size_mib in options.sizes_mib or (DEFAULT_SIZE_MIB[kernels.implementation],):
            yield from _measure(codecs, size_mib, options.threads)
    finally:
        kernels.set_threads(before)


def _measure(codecs: list[Codec], size_mib: int, threads: int) -> list[Row]:
    values = weights(size_mib * MIB // 4)
    out = np.zeros_like(values)
    with ThreadPoolExecutor(threads) as pool:
        contenders = list(_copies(values, out, threads, pool))
        contenders += [_checksum(values), rivals.crc32(values)]
        for codec in codecs:
            contenders += _ours(codec, values, out)
            contenders += rivals.contenders(codec, values, out, threads)
        seconds: dict[Contender, float] = {}
        for group, spare_memory in _groups(contenders):
            with _spare_memory(spare_memory):
                seconds |= zip(group, time_all([contender.run for contender in group]), strict=True)
    rows = [
        {
            "suite": "speed",
            "codec": contender.codec,
            "op": contender.op,
            "output": contender.output,
            "impl": contender.impl,
            "isa": kernels.isa if contender.impl == kernels.implementation else None,
            "threads": threads,
            "size_mib": size_mib,
            "gbps": values.nbytes / 1e9 / seconds[contender],
        }
        for contender in contenders
    ]
    return _with_ratios(rows)


def _groups(contenders: list[Contender]) -> Iterator[tuple[list[Contender], bool]]:
    """Contenders that are measured in turns, and whether memory of dropped tensors is kept meanwhile."""
    by_output = {output: [one for one in contenders if one.output == output] for output in ("warm", "none", "fresh")}
    yield by_output["warm"] + by_output["none"], True
    yield by_output["fresh"], False
    for contender in contenders:
        if contender.output == "reused":  # each by itself: what it drops is for it to take again
            yield [contender], True


def time_all(runs: list[Callable[[], Any]]) -> list[float]:
    """Median seconds of each, over rounds that go through all of them in turn."""
    gc.collect()
    gc.disable()
    try:
        slow = [_time(run) > _SLOW for run in runs]  # the warm-up, too
        times: list[list[float]] = [[] for _ in runs]
        for number in range(ROUNDS):
            for run, record, is_slow in zip(runs, times, slow, strict=True):
                if number < FEWER_ROUNDS or not is_slow:
                    record.append(_time(run))
    finally:
        gc.enable()
    return [median(record) for record in times]


def _time(run: Callable[[], Any]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def _copies(values: Weights, out: Weights, threads: int, pool: ThreadPoolExecutor) -> Iterator[Contender]:
    parts = _parts(values.size, threads)
    copy = _together([partial(np.copyto, out[start:stop], values[start:stop]) for start, stop in parts], pool)
    fresh = _together([values[start:stop].copy for start, stop in parts], pool)
    yield Contender("raw", "copy", "memcpy", "warm", copy)
    yield Contender("raw", "copy", "memcpy", "fresh", fresh)


def _checksum(values: Weights) -> Contender:
    return Contender("crc32c", "checksum", kernels.implementation, "none", lambda: crc32c(values))


def _ours(codec: Codec, values: Weights, out: Weights) -> Iterator[Contender]:
    name, impl = repr(codec), kernels.implementation
    if not codec.in_place:
        ours = _Ours(codec, values, out)
        yield Contender(name, "encode", impl, "warm", ours.encode)
        yield Contender(name, "encode", impl, "fresh", ours.encode_allocating)
        yield Contender(name, "encode", impl, "reused", ours.encode_allocating)
        yield Contender(name, "decode", impl, "warm", ours.decode)
        yield Contender(name, "decode", impl, "fresh", ours.decode_allocating)
        yield Contender(name, "decode", impl, "reused", ours.decode_allocating)
    state, into = {"x": values}, {"x": out}
    message = tensorwire.dumps(state, codec=codec)
    yield Contender(name, "encode_stream", impl, "warm", lambda: _drain(tensorwire.encode(state, codec=codec)))
    yield Contender(name, "decode_stream", impl, "warm", lambda: _drain(tensorwire.decode(message, into=into)))
    for output in ("fresh", "reused"):
        yield Contender(name, "decode_stream", impl, output, lambda: _drain(tensorwire.decode(message)))


class _Ours:
    """Our codec over one array, into warm memory and into what it allocates as streams do."""

    def __init__(self, codec: Codec, values: Weights, out: Weights) -> None:
        self._codec = codec
        self._view = view_of(values)
        self._data = values.view(np.uint8)
        self._out = out.view(np.uint8)
        self._extent = Extent.whole(dtypes.FLOAT32, values.shape)
        self._warm = np.zeros(codec.sizes(values.size, dtypes.FLOAT32).total, np.uint8)
        self._payload = bytes(self._encode(self._take_warm))

    def encode(self) -> None:
        self._encode(self._take_warm)

    def encode_allocating(self) -> None:
        self._encode(SPARE.empty)

    def decode(self) -> None:
        self._codec.decode(memoryview(self._payload), self._extent, self._out)

    def decode_allocating(self) -> None:
        self._codec.decode(memoryview(self._payload), self._extent, SPARE.empty(self._out.size))

    def _encode(self, take: Take) -> Any:
        # What a codec must know of the whole tensor (double quantization: its mean) is part of the work.
        context = self._codec.prepare(self._view) if self._view is not None else None
        return self._codec.encode(self._data, self._extent, take, context).payload

    def _take_warm(self, size: int) -> npt.NDArray[np.uint8]:
        return self._warm[:size]


def _parts(count: int, parts: int) -> list[tuple[int, int]]:
    """[start, stop) of about equal parts."""
    step = -(-count // parts)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _together(jobs: list[Callable[[], Any]], pool: ThreadPoolExecutor) -> Callable[[], Any]:
    """One callable that does all jobs at once, without a pool in the way of a single one."""
    return jobs[0] if len(jobs) == 1 else lambda: list(pool.map(lambda job: job(), jobs))


@contextmanager
def _spare_memory(kept: bool) -> Iterator[None]:
    limit = tensorwire.get_spare_memory()
    if not kept:
        tensorwire.set_spare_memory(0)
    try:
        yield
    finally:
        tensorwire.set_spare_memory(limit)


def _drain(iterator: Iterator[Any]) -> None:
    for _ in iterator:
        pass


def _with_ratios(rows: list[Row]) -> list[Row]:
    memcpy = rows[0]["gbps"]
    theirs: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if row["impl"] not in ("memcpy", kernels.implementation):
            theirs[row["codec"], row["op"], row["output"]] = row["gbps"]
    for row in rows:
        row["vs_memcpy"] = row["gbps"] / memcpy
        row["vs_rival"] = None
        if row["impl"] == kernels.implementation:
            # A rival that offers only one kind of output is compared with all of ours, and a stream of ours with
            # what the rival has, which is the bare work.
            first = "fresh" if row["output"] == "reused" else row["output"]
            outputs, op = (first, "warm", "fresh"), row["op"].removesuffix("_stream")
            rival = next((theirs[key] for o in outputs if (key := (row["codec"], op, o)) in theirs), None)
            row["vs_rival"] = row["gbps"] / rival if rival else None
    return rows
