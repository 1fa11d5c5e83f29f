"""Files that appear under their name only when they are complete: the only way a file gets its name.

`storage.parts` has files that are written over several attempts. `import tensorwire` does not load it.
"""

from tensorwire.storage.atomic import Target, new_folder, rename, replacing, write_file
from tensorwire.storage.output import Output, OutputFile, open_to_read, read_at, storing, write_object

__all__ = [
    "Output",
    "OutputFile",
    "Target",
    "new_folder",
    "open_to_read",
    "read_at",
    "rename",
    "replacing",
    "storing",
    "write_file",
    "write_object",
]
