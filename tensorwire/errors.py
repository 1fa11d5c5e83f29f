"""The errors that tensorwire raises. There are few kinds; each stands for a decision that the caller can make.

``WireError`` and its subclasses blame the bytes (a peer, a disk); ``EncodeError`` blames what the caller passed in;
``TransportError`` blames the connection. Decoders raise nothing but ``WireError``, whatever bytes arrive.
"""

from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

_NAME_SHOWN: Final = 120  # characters of a wire-supplied name that a message may carry
_Recipe: TypeAlias = "tuple[Callable[..., TensorwireError], tuple[object, ...]]"


def show(name: object) -> str:
    """A name in a form that is safe in messages and logs: ASCII only, and cut (names from a peer are not trusted)."""
    text = ascii(name)
    return text if len(text) <= _NAME_SHOWN else text[: _NAME_SHOWN - 3] + "..."


def counted(count: int, noun: str) -> str:
    """A count and what is counted, as messages and summaries say it: `1 item`, `262,144 items`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def near(word: str, known: Iterable[str], most: int = 1) -> list[str]:
    """The known names that `word` may be a misspelling of, nearest first; case, `-` and `_` do not matter."""
    from difflib import get_close_matches  # loaded only after a mistake

    plain = {_plain(name): name for name in known}
    return [plain[match] for match in get_close_matches(_plain(word), plain, most)]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _rebuild(cls: type["TensorwireError"], detail: str, state: dict[str, object]) -> "TensorwireError":
    # Bypasses __init__, whose arguments differ between kinds, so that every error can be pickled.
    error = cls.__new__(cls, detail)
    error.args = (detail,)
    for name, value in state.items():
        setattr(error, name, value)
    return error


class TensorwireError(Exception):
    """Root of every error of this library.

    Attributes: `detail` (what happened and what to do), `frame` (sequence number), `item` (name),
    `offset` (byte in the stream), `file` (path); all but the first are None where they do not apply.
    """

    file: str | None = None

    def __init__(
        self, detail: str, *, frame: int | None = None, item: object = None, offset: int | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.frame = frame
        self.item = item
        self.offset = offset

    def __str__(self) -> str:
        where = []
        if self.file is not None:
            where.append(f"file {show(self.file)}")
        if self.item is not None:
            where.append(f"item {show(self.item)}")
        if self.frame is not None:
            where.append(f"frame {self.frame}")
        if self.offset is not None:
            where.append(f"offset {self.offset}")
        return f"{self.detail} ({', '.join(where)})" if where else self.detail

    def __reduce__(self) -> _Recipe:
        return _rebuild, (type(self), self.detail, self.__dict__)


class EncodeError(TensorwireError, ValueError):
    """The input cannot be encoded as requested; it is left untouched."""


class NonFiniteError(EncodeError):
    """A NaN, an infinity or an overflow that the chosen codec cannot carry, at element `index` of the tensor."""

    def __init__(self, detail: str, *, index: int) -> None:
        super().__init__(detail)
        self.index = index

    def __str__(self) -> str:
        return f"element {self.index} is {super().__str__()}"


class WireError(TensorwireError, ValueError):
    """The bytes received are not a valid stream, or not one that this receiver accepts."""


class FormatError(WireError):
    """Bytes that no correct writer produces, although every checksum holds."""


class CorruptError(WireError):
    """A checksum or digest does not match: the bytes changed in transit or at rest. Request them again."""


class TruncatedError(WireError):
    """The input ended before the END frame. The transfer may be resumed."""


class SequenceError(WireError):
    """A frame is missing, repeated, out of order, or belongs to another stream."""


class LimitError(WireError):
    """A size exceeds a limit; raise the limit if the size is legitimate. See `tensorwire.Limits`.

    `limit` names what is too large, `allowed` is the limit and `got` the size; `field` is the field of `Limits` that
    sets it (by default the same word), or None if no field does.
    """

    def __init__(
        self,
        limit: str,
        allowed: int,
        got: int,
        *,
        field: str | None = "",
        frame: int | None = None,
        item: object = None,
        offset: int | None = None,
    ) -> None:
        detail = f"{limit} is {got}, more than the limit of {allowed}"
        field = limit if field == "" else field
        if field is not None:
            detail += f"; to allow it, pass limits=tensorwire.Limits({field}=...), or --limit {field}=... to a command"
        super().__init__(detail, frame=frame, item=item, offset=offset)
        self.limit = limit
        self.field = field
        self.allowed = allowed
        self.got = got


class UnsupportedError(WireError):
    """A version, feature, dtype or codec that this build does not know."""


class SchemaError(WireError):
    """The stream is valid but is not what `expect=` or `into=` asked for."""


class TransportError(TensorwireError, OSError):
    """The connection failed. `retryable` says whether trying again can help."""

    def __init__(self, detail: str, *, retryable: bool = True) -> None:
        super().__init__(detail)
        self.retryable = retryable


class ArgumentError(TensorwireError, TypeError):
    """An argument has a type or value that the function does not take."""


def check_function(function: object, what: str, *arguments: str) -> None:
    """Raise ArgumentError for a caller's function that cannot be called with these arguments. None is no function."""
    if function is None:
        return
    from inspect import signature  # loaded only where there is a function

    wanted = f"{what} must be a function that takes ({', '.join(arguments)})"
    if not callable(function):
        raise ArgumentError(f"{wanted}, not {type(function).__name__}")
    try:
        taken = signature(function)
    except ValueError:  # it is written in C, and does not say
        return
    try:
        taken.bind(*arguments)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise ArgumentError(f"{wanted}; {show(name)} takes {taken}: {error}") from None


class ClosedError(TensorwireError, ValueError):
    """A file was used after it was closed."""


class AuthError(TensorwireError, ValueError):
    """A tag, key or peer identity does not match: the bytes may be intact, but not from the expected author."""


class StorageError(TensorwireError, OSError):
    """A file could not be written, synced or renamed: a full disk, a quota, a missing folder.

    No partial file has the final name. Verified data can be resumed where the function says so. `errno` is the
    operating system's, or None.
    """

    def __init__(self, detail: str, *, errno: int | None = None) -> None:
        super().__init__(detail)
        self.errno = errno

    def __reduce__(self) -> _Recipe:
        # OSError keeps its errno outside __dict__, from which every other error is rebuilt.
        return _rebuild, (type(self), self.detail, {**self.__dict__, "errno": self.errno})


class MissingFileError(StorageError, FileNotFoundError):
    """No file or folder of this name exists."""
