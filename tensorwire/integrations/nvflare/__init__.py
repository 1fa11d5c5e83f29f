"""NVIDIA FLARE with tensors encoded on the wire: one line behind any recipe.

    recipe = FedAvgRecipe(..., aggregator=WireAggregator())
    add_to(recipe, down="bf16|entropy", up="nf4")

Output filters mark tensors with the codec that they are to travel with and change nothing (`WireFilter`). When FLARE
sends a message, the decomposer of marked tensors (`WireDecomposer`) offers all of them as one stream, which FLARE's
download service asks for portion by portion: each is encoded when it is asked for. What arrives is decoded as it
comes; or it is kept as it came, encoded, until it is needed: on the server to be added up, on clients as the base that
their updates are differences to (`BaseFilter`).

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
