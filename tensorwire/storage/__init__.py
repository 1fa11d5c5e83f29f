"""Files that appear under their name only when they are complete: the only way a file gets its name."""

from tensorwire.storage.atomic import Place, replacing, sync_folder, write_file
from tensorwire.storage.output import Output, OutputFile, read_at

__all__ = ["Output", "OutputFile", "Place", "read_at", "replacing", "sync_folder", "write_file"]
