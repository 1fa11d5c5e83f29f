"""Write the golden vectors, good and bad, and other small streams into a folder: seeds of a corpus.

python tests/fuzz/seeds.py FOLDER
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "golden")]

from bad import BAD
from fuzz.differential import material
from vectors import stored

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, stream in (material() | {f"bad-{name}": stored(f"bad/{name}") for name in BAD}).items():
        (folder / name.replace("/", "-").replace("|", "-")).write_bytes(stream)
