"""The one public name of an item, and back (docs/format.md, section 5.4; decision 0022).

    ("layer.0.weight",)          layer.0.weight            a text key of the root is its own name
    ("model", "layer.0.weight")  /model/layer.0.weight     anything deeper is a JSON pointer (RFC 6901)
    ("state", 0, "exp_avg")      /state/0/exp_avg          ints as they are
    ("state", "0", "a/b~c")      /state/~20/a~1b~0c        ~0 is ~, ~1 is /, ~2 marks text that looks like an int
    ()                                                     the root has the empty name

No two paths have the same name. Names are shown, matched by patterns and looked up, but never used as file paths.
"""

import re
from typing import Final

from tensorwire.errors import ArgumentError, show

Key = str | int
Path = tuple[Key, ...]

_INT: Final = re.compile("0|-?[1-9][0-9]{0,15}")  # keys are within 2^53, so none has more digits
_ESCAPE: Final = re.compile("~(?![01])")


def name_of(path: Path) -> str:
    """The name of the item at `path`, as used by `decode`, `into=`, files and codec patterns.

    `path`: the keys from the root on, text and ints.

        tensorwire.name_of(("model", "layer.0.weight"))  # "/model/layer.0.weight"
    """
    if type(path) is tuple and len(path) == 1:
        key = path[0]
        if type(key) is str and key and key[0] != "/":
            return key
    if not isinstance(path, (tuple, list)):
        raise ArgumentError(f"a path is a tuple of keys, not {show(path)}")
    return "".join(map(_pointed, path))


def path_of(name: str) -> Path:
    """The path of the item that has this name.

    Raises ArgumentError for a name that no item can have.

        tensorwire.path_of("/state/0/exp_avg")  # ("state", 0, "exp_avg")
    """
    if not isinstance(name, str):
        raise ArgumentError(f"the name of an item is text, not {show(name)}")
    if not name.startswith("/"):
        return (name,) if name else ()
    path = tuple(map(_key, name[1:].split("/")))
    if name_of(path) != name:
        raise ArgumentError(f"{show(name)} is not the name of an item; its path is written {show(name_of(path))}")
    return path


def _pointed(key: Key) -> str:
    if type(key) is int:
        return f"/{key}"
    text = str(key)
    if _INT.fullmatch(text):
        return f"/~2{text}"
    return "/" + text.replace("~", "~0").replace("/", "~1")


def _key(text: str) -> Key:
    if _INT.fullmatch(text):
        return int(text)
    text = text.removeprefix("~2")
    wrong = _ESCAPE.search(text)
    if wrong is not None:
        raise ArgumentError(f"{show(text)} in the name of an item: ~ must be followed by 0 (for ~), 1 (for /) or 2")
    return text.replace("~1", "/").replace("~0", "~")
