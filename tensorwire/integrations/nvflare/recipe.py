"""The one line after a recipe."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorwire
from tensorwire.errors import ArgumentError
from tensorwire.integrations.nvflare.aggregator import WireAggregator
from tensorwire.integrations.nvflare.decomposer import WireRegister
from tensorwire.integrations.nvflare.filters import BaseFilter, WireFilter
from tensorwire.integrations.nvflare.model import CodecSpec, is_quantizer


def add_to(
    recipe: Any,
    *,
    down: CodecSpec = "bf16|entropy",
    up: CodecSpec = "nf4",
    difference: bool | None = None,
    lazy: bool | None = None,
    tasks: Sequence[str] = ("train",),
) -> None:
    """Make a recipe's job send models with the codec `down` and updates with the codec `up`.

    Call it last, after adding your own filters. `difference`: clients send differences in place of whole weights, and
    FLARE adds them to the global model; None: if the recipe has the choice (`params_transfer_type`), as those for
    FedAvg do. `lazy`: the server keeps replies encoded until they are added up by an aggregation that calls
    `materialize`; None: if the recipe's aggregator is a `WireAggregator`. `tasks`: the tasks whose data and results
    are encoded.

        recipe = FedAvgRecipe(..., aggregator=WireAggregator())
        tensorwire.integrations.nvflare.add_to(recipe)

    Raises ArgumentError for a quantizer `up` if whole weights would be sent, because training would start from rounded
    weights each round.
    """
    transfer = getattr(recipe, "params_transfer_type", None)
    if difference is None:
        difference = transfer is not None
    if not difference and str(getattr(transfer, "value", transfer)) != "DIFF":
        _check_carries_weights(up)
    if lazy is None:
        lazy = isinstance(getattr(recipe, "aggregator", None), WireAggregator)
    job = getattr(recipe, "_job", None) or recipe.job
    job.job.set_app_packages([*job.job.app_packages, "tensorwire"])  # which sites have: no job is to bring it along
    named = list(tasks)
    recipe.add_server_output_filter(WireFilter(down), tasks=named)
    recipe.add_client_output_filter(WireFilter(up, difference), tasks=named)
    if difference:
        recipe.add_client_input_filter(BaseFilter(), tasks=named)
    job.to_server(WireRegister(lazy), id="tensorwire")
    add: Callable[..., Any] = getattr(recipe, "_add_to_client_apps", job.to_clients)  # keeps what sites have apart
    add(WireRegister(difference), id="tensorwire")


def _check_carries_weights(up: CodecSpec) -> None:
    for spec in [up] if isinstance(up, str) else up.values():
        codec = tensorwire.codec(spec)
        if is_quantizer(codec):
            raise ArgumentError(f"up={spec!r} is for differences, but whole weights would be sent: see difference=")
