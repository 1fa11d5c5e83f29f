"""The mean of replies that are still encoded."""

import math
from typing import Any

from tensorwire.errors import SchemaError
from tensorwire.integrations.nvflare.decomposer import WireRef
from tensorwire.integrations.nvflare.flare import FLMetaKey, FLModel, ModelAggregator, try_malloc_trim
from tensorwire.integrations.nvflare.model import as_sent
from tensorwire.updates import is_finite, mean_of


class WireAggregator(ModelAggregator):  # type: ignore[misc]  # FLARE has no types
    """The weighted mean of the clients' replies, added up slice by slice when all have answered.

    Replies are kept as received, with `lazy=True` encoded: in the memory of an encoded model each, or on disk with
    FLARE's tensor disk offload. The mean is that of `tensorwire.updates.mean_of`, in the order of the clients' names:
    the same bits whoever answers first, in the dtypes that were sent, with tied tensors still tied. A client's weight
    is its number of steps times its factor in `aggregation_weights`. The tensors of a mean are valid until the next
    round begins: copy them to keep them longer.
    """

    def __init__(self, aggregation_weights: dict[str, float] | None = None) -> None:
        ModelAggregator.__init__(self)
        self.aggregation_weights = aggregation_weights
        self._models: dict[str, FLModel] = {}
        self._result: FLModel | None = None

    def reset_stats(self) -> None:
        """Drop all replies, and the tensors of the previous mean, which FLARE keeps without using them."""
        self._models = {}
        if self._result is not None:
            self._result.params = {}
        try_malloc_trim()

    def accept_model(self, model: FLModel) -> None:
        """Keep a reply. Raises SchemaError for one that does not match the others, which are kept."""
        client = str((model.meta or {}).get("client_name", len(self._models)))
        if client in self._models:
            raise SchemaError(f"client {client!r} has answered already in this round")
        first = next(iter(self._models.values()), model)
        if list(first.params) != list(model.params) or first.params_type != model.params_type:
            raise SchemaError(f"client {client!r} sends other tensors, or in another order, than those before it")
        for name, value in model.params.items():
            _check_addable(name, _plain(value), _plain(first.params[name]))
        self._models[client] = model

    def aggregate_model(self) -> FLModel:
        """The mean of the replies, as the update of the global model."""
        models = [self._models[client] for client in sorted(self._models)]
        if not models:
            raise SchemaError("no client has sent a model in this round: there is no mean")
        weights = [self._weight(client) for client in sorted(self._models)]
        params: dict[str, Any] = {}
        means: dict[tuple[int, ...], Any] = {}  # of tensors that are the same objects in every reply
        for name in models[0].params:
            values = [model.params[name] for model in models]
            key = tuple(map(id, values))
            if key not in means:
                means[key] = _mean(name, values, weights)
            params[name] = means[key]
        self._models = {}
        self._result = FLModel(params=params, params_type=models[0].params_type, metrics=_metrics(models, weights))
        return self._result

    def _weight(self, client: str) -> float:
        steps = (self._models[client].meta or {}).get(FLMetaKey.NUM_STEPS_CURRENT_ROUND)
        if not isinstance(steps, (int, float)) or isinstance(steps, bool) or not 0 < steps < math.inf:
            steps = 1  # as FLARE counts a client that does not say
        return float(steps) * (self.aggregation_weights or {}).get(client, 1.0)


def _mean(name: str, values: list[Any], weights: list[float]) -> Any:
    try:
        mean = mean_of([_plain(value) for value in values], weights)
    except SchemaError as error:
        error.item = name
        raise
    return as_sent(values[0].library, mean) if isinstance(values[0], WireRef) else mean


def _plain(value: Any) -> Any:
    """What `mean_of` takes."""
    return value.encoded if isinstance(value, WireRef) else value


def _check_addable(name: str, value: Any, first: Any) -> None:
    """Raise SchemaError for a tensor that is another than the first client's, or that would spoil the mean."""
    if (value.dtype, tuple(value.shape)) != (first.dtype, tuple(first.shape)):
        raise SchemaError(
            f"{value.dtype} {list(value.shape)}, where the first client sent {first.dtype} {list(first.shape)}",
            item=name,
        )
    if not is_finite(value):
        raise SchemaError("NaN or an infinity, which would be all that is left of the mean", item=name)


def _metrics(models: list[FLModel], weights: list[float]) -> dict[str, float] | None:
    """The weighted means of the metrics that all clients report as finite numbers."""
    if any(model.metrics is None for model in models):
        return None
    means = {}
    for name in models[0].metrics:
        values = [model.metrics.get(name, math.nan) for model in models]
        if all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            means[name] = math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / math.fsum(
                weights
            )
    return means or None
