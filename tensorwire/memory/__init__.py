"""Memory that is used again: of dropped tensors, and frame buffers."""

from tensorwire.memory.buffers import FixedMemory, GrowingMemory, Pool, Scratch
from tensorwire.memory.spare import SPARE, get_spare_memory, set_spare_memory

__all__ = ["SPARE", "FixedMemory", "GrowingMemory", "Pool", "Scratch", "get_spare_memory", "set_spare_memory"]
