"""Which codec each tensor gets: one for all, by pattern over names, or by a function."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

from tensorwire.codecs import RAW, Codec, Stage, parse
from tensorwire.errors import EncodeError, near, show
from tensorwire.streams.report import Report
from tensorwire.tensor import TensorView

CodecSpec = str | Stage | Codec
CodecChoice = CodecSpec | Mapping[str, CodecSpec] | Callable[[str, Any], CodecSpec]

_NAMES_KEPT: Final = 4096  # to find those in that look like a pattern that matches none
_NAMES_SHOWN: Final = 3


def rule(choice: CodecChoice, report: Report | None = None) -> "CodecRule":
    """What `codec=` means, as a `Rule`.

    A mapping's keys are shell patterns over dotted names, the first match wins, and what none matches is raw; a pattern
    that matches no tensor, or can match none behind those before it, is an error. A tensor that its codec cannot
    represent (another dtype, or values that the codec's policy sends raw) travels losslessly, compressed where the
    codec compresses, and stands in `report`. Raises EncodeError.
    """
    return CodecRule(_selector(choice), _patterns(choice) if isinstance(choice, Mapping) else [], report)


class CodecRule:
    """`flatten.Rule` for the choices that a caller has."""

    def __init__(self, select: Callable[[str, Any], Codec], patterns: list[str], report: Report | None) -> None:
        self._select = select
        self._unmet = patterns
        self._report = report
        self._names: list[str] = []

    def __call__(self, name: str, value: Any, view: TensorView, /) -> Codec:
        """The codec that the choice means for a tensor."""
        self.seen(name)
        chosen = self._select(name, value)
        reason = chosen.fallback(view) if chosen.accepts(view.dtype) else view.dtype.name
        if not reason:
            return chosen
        used = chosen.lossless_fallback()
        if self._report is not None:
            self._report.add_otherwise(name, repr(chosen), repr(used), reason)
        return used

    def seen(self, name: str, /) -> None:
        """Note that there is a tensor of this name."""
        if not self._unmet:
            return
        self._unmet = [pattern for pattern in self._unmet if not fnmatchcase(name, pattern)]
        if len(self._names) < _NAMES_KEPT:
            self._names.append(name)

    def finish(self) -> None:
        """Raise EncodeError for a pattern that matched none of the tensors, if there were any."""
        if self._unmet and self._names:
            pattern = self._unmet[0]
            names = _near(pattern, self._names)
            nearest = "nearest:" if names else "there are"
            shown = ", ".join(map(show, names or self._names[:_NAMES_SHOWN]))
            raise EncodeError(f"codec pattern {show(pattern)} matches no tensor; {nearest} {shown}")


def _near(pattern: str, names: list[str]) -> list[str]:
    """The names that look most like what a pattern says between its wildcards, as a whole or at either end."""
    wanted = pattern.strip("*?.")
    parts = wanted.count(".") + 1
    pieces: dict[str, str] = {}
    for name in names:
        split = name.split(".")
        for piece in (name, ".".join(split[-parts:]), ".".join(split[:parts])):
            pieces.setdefault(piece, name)
    return list(dict.fromkeys(pieces[piece] for piece in near(wanted, pieces, _NAMES_SHOWN)))


def _selector(choice: Any) -> Callable[[str, Any], Codec]:
    if isinstance(choice, Mapping):
        patterns = [(pattern, parse(spec)) for pattern, spec in choice.items()]
        return lambda name, value: next((codec for pattern, codec in patterns if fnmatchcase(name, pattern)), RAW)
    if isinstance(choice, (str, Stage, Codec)):
        codec = parse(choice)
        return lambda name, value: codec
    if callable(choice) and not isinstance(choice, type):
        return lambda name, value: parse(choice(name, value))
    given = f"the class {choice.__name__}" if isinstance(choice, type) else type(choice).__name__
    raise EncodeError(f"codec must be a spec, a stage, a mapping of patterns or a function, not {given}")


def _patterns(choice: Mapping[str, CodecSpec]) -> list[str]:
    """The patterns. Raises EncodeError for one that is no text, and one that another leaves nothing to match."""
    before: list[str] = []
    for pattern in choice:
        if type(pattern) is not str:
            raise EncodeError(f"a codec pattern is text, not {pattern!r}")
        # With no wildcard but *, what matches the text of a pattern matches all that the pattern does.
        wider = next((text for text in before if not set(text) & set("?[") and fnmatchcase(pattern, text)), None)
        if wider is not None:
            raise EncodeError(
                f"codec pattern {show(pattern)} stands behind {show(wider)}, which matches all that it does; "
                "the first match wins: put it before"
            )
        before.append(pattern)
    return before
