"""Versions at rest: what changed between two files, and a file that is made of another one and its patches.

    for buffer in diff("old.safetensors", "new.safetensors"): ...
    patch("old.safetensors", ["patch.tw"], "restored.safetensors")

Files are `.safetensors`, sharded checkpoints (their index or folder) and `.tw`. They are read block by block and never
loaded; patches are held as they are, encoded.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np

from tensorwire import streams
from tensorwire.errors import SchemaError, WireError
from tensorwire.files import safetensors
from tensorwire.files.checkpoint import open_checkpoint
from tensorwire.files.source import File, is_path, opened
from tensorwire.files.tw import TensorFile, save_file
from tensorwire.limits import DEFAULT, Limits
from tensorwire.numpy import FRONT
from tensorwire.storage.output import file_name
from tensorwire.streams import Report
from tensorwire.streams.patches import encode_patch
from tensorwire.streams.unflatten import Unflattener
from tensorwire.tensor import Buffer, TensorView, ViewFront
