"""Files that appear under their name only when they are complete: the only way a file gets its name.

`storage.parts`, which `import tensorwire` does without, has files that are written over several attempts.
"""

from tensorwire.storage.atomic import Target, rename, replacing, write_file
from tensorwire.storage.output import Output, OutputFile, read_at

__all__ = ["Output", "OutputFile", "Target", "read_at", "rename", "replacing", "write_file"]
