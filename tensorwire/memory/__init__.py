"""Memory that is reused: frame buffers, and the memory of dropped tensors."""

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
