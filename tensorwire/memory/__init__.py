"""Memory that is used again: of dropped tensors, and frame buffers."""

from tensorwire.memory.buffers import FixedMemory, GrowingMemory, Memory, Pool, Scratch
from tensorwire.memory.spare import SPARE, float32_arrays, get_spare_memory, set_spare_memory

__all__ = [
    "SPARE",
    "FixedMemory",
    "GrowingMemory",
    "Memory",
    "Pool",
    "Scratch",
    "float32_arrays",
    "get_spare_memory",
    "set_spare_memory",
]
