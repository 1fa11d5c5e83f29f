"""NVIDIA FLARE with encoded tensors: one line after any recipe.

    recipe = FedAvgRecipe(..., aggregator=WireAggregator())
    add_to(recipe, down="bf16|entropy", up="nf4")

Output filters mark tensors with a codec and change nothing (`WireFilter`). When FLARE sends a message, the decomposer
of marked tensors (`WireDecomposer`) offers all of them as one stream. FLARE's download service requests it in portions,
each of which is encoded on request. A receiver decodes tensors as they arrive, or keeps them encoded until they are
needed: the server to add them up, clients as the base of their differences (`BaseFilter`).

`EncodeFilter` and `DecodeFilter` do the same without a decomposer, a whole message at a time.
"""

from tensorwire.integrations.nvflare.aggregator import WireAggregator
from tensorwire.integrations.nvflare.decomposer import (
    DOWNLOAD_TYPE,
    PORTION,
    Wire,
    WireDecomposer,
    WireRef,
    WireRegister,
    register,
)
from tensorwire.integrations.nvflare.filters import BaseFilter, DecodeFilter, EncodeFilter, WireFilter
from tensorwire.integrations.nvflare.recipe import add_to

__all__ = [
    "DOWNLOAD_TYPE",
    "PORTION",
    "BaseFilter",
    "DecodeFilter",
    "EncodeFilter",
    "Wire",
    "WireAggregator",
    "WireDecomposer",
    "WireFilter",
    "WireRef",
    "WireRegister",
    "add_to",
    "register",
]
