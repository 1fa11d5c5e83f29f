"""Chooses the codec of each tensor: one for all, by pattern over names, or by a function."""

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase, translate
from functools import partial
from typing import Any, Final

from tensorwire import dtypes
from tensorwire.codecs import RAW, Codec, Stage, parse
from tensorwire.errors import EncodeError, check_function, near, show
from tensorwire.streams.report import Report
from tensorwire.tensor import TensorView

CodecSpec = str | Stage | Codec
CodecChoice = CodecSpec | Mapping[str, CodecSpec] | Callable[[str, Any], CodecSpec]

_NAMES_KEPT: Final = 4096  # for suggestions when a pattern matches nothing
_NAMES_SHOWN: Final = 3
# The dtypes of quantized weights: one code per element, or several in 32 bits.
_CODES: Final = frozenset(
    dtype
    for dtype in dtypes.ALL
    if (dtype.itemsize == 1 and dtype != dtypes.BOOL) or dtype in (dtypes.INT32, dtypes.UINT32)
)
_CUT: Final = re.compile("[._/]")  # characters that may follow the name of the codes
_TABLE: Final = 4096  # bytes that the scales and tables of the smallest weights may have


def rule(choice: CodecChoice, report: Report | None = None) -> "CodecRule":
    """The value of `codec=` as a `Rule`.

    A mapping's keys are shell patterns over names (`tensorwire.name_of`). The first match wins, and a tensor that no
    pattern matches is raw. A pattern that matches no tensor, or that earlier patterns make unreachable, is an error. A
    tensor that its codec cannot represent (another dtype, or values that the codec's policy sends raw) is sent
    losslessly, compressed if the codec compresses, and listed in `report`.

    So are the scales and tables of already quantized weights: floats that are named after codes (a tensor of bytes or
    of 32-bit ints), or that are beside a matrix of codes in the same module and take at most half their bytes. All that
    remains of the weights' precision depends on them. A function may decide otherwise; in an iterator of pairs, the
    codes must come first.

    A tensor with several names gets the codec that keeps the most of it: a lossless one if any name asks for one.
    Raises EncodeError; ArgumentError for a function that does not take a name and a tensor.
    """
    explicit = callable(choice) and not isinstance(choice, (Stage, Codec))
    return CodecRule(_selector(choice), report, exact_scales=not explicit)


class CodecRule:
    """`flatten.Rule` for the choices that a caller has."""

    def __init__(
        self,
        select: Callable[[str, Any], Codec],
        report: Report | None,
        *,
        exact_scales: bool = True,
    ) -> None:
        self._select = select
        self._patterns = select if isinstance(select, _Patterns) else None
        self._report = report
        self._exact_scales = exact_scales
        self._names: list[str] = []
        self._codes: dict[str, int] = {}  # bytes of codes, by name
        self._modules: dict[str, int] = {}  # bytes of the largest matrix of codes, by module

    def notice(self, name: str, view: TensorView, /) -> None:
        """Note that there is a tensor of this name."""
        if view.dtype in _CODES:
            size = self._codes[name] = view.numel * view.dtype.itemsize
            if len(view.shape) > 1:
                self._modules[_module(name)] = max(size, self._modules.get(_module(name), 0))
        if self._patterns is not None:
            if len(self._names) < _NAMES_KEPT:
                self._names.append(name)
            if view.codec is not None:  # this rule will not be asked
                self._patterns(name, view)

    def __call__(self, name: str, value: Any, view: TensorView, /, *, others: Sequence[str] = ()) -> Codec:
        """The codec that the choice gives to a tensor."""
        chosen = self._select(name, value)
        if others:
            chosen = max(chosen, *(self._select(each, value) for each in others), key=partial(_kept, view))
        if not chosen.accepts(view.dtype):
            reason = view.dtype.name
        elif not chosen.lossless and self._is_scale(name, view):
            reason = "scale of quantized weights"
        else:
            reason = chosen.fallback(view)
        if not reason:
            return chosen
        used = chosen.lossless_fallback()
        if self._report is not None:
            self._report.add_otherwise(name, repr(chosen), repr(used), reason)
        return used

    def _is_scale(self, name: str, view: TensorView) -> bool:
        """Whether a tensor that a codec would round is a scale or table of quantized weights."""
        if not self._codes or not self._exact_scales:
            return False
        stems = (name[: cut.start()] for cut in _CUT.finditer(name))
        codes = max(self._modules.get(_module(name), 0), *(self._codes.get(stem, 0) for stem in stems), 0)
        return codes > 0 and view.numel * view.dtype.itemsize <= max(codes // 2, _TABLE)

    def finish(self) -> None:
        """Raise EncodeError for a pattern that matched none of the tensors, if there were any."""
        if self._patterns is not None and self._patterns.unmet and self._names:
            pattern = self._patterns.unmet[0]
            names = _near(pattern, self._names)
            nearest = "nearest:" if names else "there are"
            shown = ", ".join(map(show, names or self._names[:_NAMES_SHOWN]))
            raise EncodeError(f"codec pattern {show(pattern)} matches no tensor; {nearest} {shown}")


def _kept(view: TensorView, codec: Codec) -> tuple[int, int, str]:
    """A sort key that is highest for the codec that keeps the most of a tensor: a lossless one, else the largest."""
    if not codec.accepts(view.dtype):
        return 1, 0, repr(codec)
    if codec.lossless:
        return 2, 0, repr(codec)
    return 0, codec.bound(max(view.numel, 1), view.dtype), repr(codec)


def _module(name: str) -> str:
    return name[: max(name.rfind("."), name.rfind("/"), 0)]


def _near(pattern: str, names: list[str]) -> list[str]:
    """The names most similar to the text of a pattern between its wildcards, as a whole or at either end."""
    wanted = pattern.strip("*?./").replace("/", ".")
    parts = wanted.count(".") + 1
    pieces: dict[str, str] = {}
    for name in names:
        split = name.strip("/").replace("/", ".").split(".")
        for piece in (split, split[-parts:], split[:parts]):
            pieces.setdefault(".".join(piece), name)
    return list(dict.fromkeys(pieces[piece] for piece in near(wanted, pieces, _NAMES_SHOWN)))


def _selector(choice: Any) -> Callable[[str, Any], Codec]:
    if isinstance(choice, Mapping):
        return _Patterns(choice)
    if isinstance(choice, (str, Stage, Codec)):
        codec = parse(choice)
        return lambda name, value: codec
    if callable(choice) and not isinstance(choice, type):
        check_function(choice, "codec", "name", "tensor")
        return lambda name, value: parse(choice(name, value))
    given = f"the class {choice.__name__}" if isinstance(choice, type) else type(choice).__name__
    raise EncodeError(f"codec must be a spec, a stage, a mapping of patterns or a function, not {given}")


class _Patterns:
    """Codecs by pattern; `unmet`: the patterns that have matched no name yet."""

    def __init__(self, choice: Mapping[str, CodecSpec]) -> None:
        self.unmet = _checked(choice)
        self._rows = [(pattern, re.compile(translate(pattern)).match, parse(choice[pattern])) for pattern in choice]

    def __call__(self, name: str, value: Any, /) -> Codec:
        chosen: Codec | None = None
        for pattern, matches, codec in self._rows:
            if chosen is not None and not self.unmet:
                break
            if (chosen is None or pattern in self.unmet) and matches(name):
                chosen = codec if chosen is None else chosen
                if pattern in self.unmet:
                    self.unmet.remove(pattern)
        return RAW if chosen is None else chosen


def _checked(choice: Mapping[str, CodecSpec]) -> list[str]:
    """The patterns. Raises EncodeError for one that is not text, or that an earlier one makes unreachable."""
    before: list[str] = []
    for pattern in choice:
        if type(pattern) is not str:
            raise EncodeError(f"a codec pattern is text, not {pattern!r}")
        # If * is the only wildcard, a pattern that matches the text of another also matches everything that the other
        # does.
        wider = next((text for text in before if not set(text) & set("?[") and fnmatchcase(pattern, text)), None)
        if wider is not None:
            raise EncodeError(
                f"codec pattern {show(pattern)} comes after {show(wider)}, which matches everything that it does; "
                "the first match wins: put it before"
            )
        before.append(pattern)
    return before
