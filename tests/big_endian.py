"""What the reference reader says to every stored vector, as one line each: the same on every machine, or the page means
something else there. Standard library only, to run under emulation; see tests/big_endian.
"""

import hashlib
import struct
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import reference


def exact(value: Any) -> Any:
    """A tree in terms whose repr is one for each value: floats by their bits."""
    if type(value) is float:
        return "float", struct.pack(">d", value)
    if type(value) is dict:
        return "dict", [(key, exact(child)) for key, child in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [exact(child) for child in value]
    return value


def main() -> None:
    for path in sorted((HERE / "golden").glob("**/*.tw")):
        try:
            stream = reference.read(path.read_bytes())
        except reference.Refused as error:
            said = f"{type(error).__name__}: {error}"
        else:
            said = hashlib.sha256(repr(exact(stream)).encode()).hexdigest()
        print(path.relative_to(HERE), said)


if __name__ == "__main__":
    print(sys.byteorder, file=sys.stderr)
    main()
