"""Files that appear under their name only when they are complete: the only way a file gets its name."""

from tensorwire.storage.atomic import Target, rename, replacing, write_file
from tensorwire.storage.output import Output, OutputFile, read_at
from tensorwire.storage.parts import Part, scratch

__all__ = ["Output", "OutputFile", "Part", "Target", "read_at", "rename", "replacing", "scratch", "write_file"]
