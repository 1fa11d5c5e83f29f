"""Flower's FedAvg in the memory of the model."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from tensorwire import numpy, updates
from tensorwire.dtypes import DType
from tensorwire.errors import ArgumentError, TensorwireError
from tensorwire.integrations.flower.arrays import (
    Numbers,
    Received,
    WireArray,
    bytes_of,
    converted,
    once,
    record_views,
    rounded,
    shaped_like,
    to_record,
    view_of,
)
from tensorwire.integrations.flower.grid import WireGrid
from tensorwire.integrations.flower.records import LOG, encoded
from tensorwire.streams import CodecChoice
from tensorwire.tensor import TensorView
from tensorwire.updates import Rules, Terms, Update


class StreamingFedAvg(FedAvg):
    """Flower's `FedAvg` in the memory of the model: adds up encoded updates, slice by slice.

    Its arguments are those of `FedAvg`. The mean is calculated in float64 and in the order of the nodes, and every
    array keeps its dtype. An update that does not fit the model is left out, and the log says so.

    As the second base class of a strategy that builds on `FedAvg`, it replaces that strategy's mean:

        class Strategy(FedAdam, StreamingFedAvg): ...
    """

    in_place: bool = False
    """Write the mean over the arrays that the round began with: over tensors that `to_record` was given, on the CPU.

    Otherwise each round makes a new model while the old one is still there, as always where another strategy stands
    before this one, which may want to compare the two."""

    _base: ArrayRecord | None = None
    _down: CodecChoice = "raw"
    _dtypes: Mapping[str, DType] = MappingProxyType({})  # those that arrays were first sent with

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As Flower's; the arrays are what the updates of this round are added to."""
        self._base = arrays
        self._dtypes = {name: view.dtype for name, view in record_views(arrays).items()} | dict(self._dtypes)
        self._down = grid.down if isinstance(grid, WireGrid) else "raw"
        return super().configure_train(server_round, arrays, config, grid)  # type: ignore[no-any-return]  # Flower's types are not read

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As Flower's. Raises ArgumentError before `configure_train`."""
        if self._base is None:
            raise ArgumentError("call configure_train before aggregate_train")
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        alone = type(self).aggregate_train is StreamingFedAvg.aggregate_train
        model = _model(self._base, self._dtypes, in_place=self.in_place and alone)
        counted = self._checked(valid, model)
        if not counted:
            return None, None
        # Before the model moves, which the arrays of the replies are calculated from.
        metrics = self.train_metrics_aggr_fn([content for _, (_, content) in counted], self.weighted_by_key)
        updates.average([update for update, _ in counted], into=model, down=self._down)
        _average_integers(model, [(update.terms.weight, record) for update, (record, _) in counted])
        return to_record(model), metrics

    def _checked(
        self, replies: Iterable[Message], model: dict[str, Numbers]
    ) -> list[tuple[Update, tuple[ArrayRecord, RecordDict]]]:
        """The updates that count, in the order of their nodes, with the records that they came in."""
        counted = []
        for reply in replies:
            node, content = reply.metadata.src_node_id, reply.content
            record = next(iter(content.array_records.values()))
            weight = next(iter(content.metric_records.values()))[self.weighted_by_key]
            try:
                counted.append((_update(record, node, weight, model, self._down), (record, content)))
            except (TensorwireError, ValueError) as error:
                LOG.warning("tensorwire: the update of node %s is left out: %s", node, error)
        return sorted(counted, key=lambda row: row[0].client)


def _model(record: ArrayRecord, dtypes: Mapping[str, DType], *, in_place: bool) -> dict[str, Numbers]:
    """The arrays of a record to be written to: the tensors in it, or copies."""
    made: dict[object, Numbers] = {}
    model = {}
    for name, array in record.items():
        view = converted(view_of(name, array), dtypes[name])
        model[name] = once(made, view, name, partial(_writable, array, view, in_place))
    return model


def _writable(array: Array, view: TensorView, in_place: bool) -> Numbers:
    if in_place and isinstance(array, WireArray) and array.tensor is not None and array.view is view:
        try:
            return updates.arrays({"": array.tensor})[""]
        except TensorwireError:  # on a device, or not contiguous
            pass
    return numpy.FRONT.wrap(bytes_of(view), view.dtype, view.shape)


def _update(record: ArrayRecord, node: int, weight: Any, model: dict[str, Numbers], down: CodecChoice) -> Update:
    """What a node has sent, checked. Raises a WireError, or ValueError for an invalid weight."""
    views = record_views(record)
    origin: Received | None = getattr(next(iter(record.values())), "origin", None)
    if origin is None or origin.views.keys() != record.keys() or not _all_of(record, origin):
        # From a node without the mod, or arrays that something on the way has changed.
        terms = Terms(run="", round=0, client=str(node))
        origin = Received(encoded(shaped_like(views, updates.views(model)), "raw", terms), terms, views)
    update = updates.check_update(origin.data, model, origin.terms, Rules(down=down))
    updates.check_weight(weight)
    return replace(update, terms=replace(update.terms, client=str(node), weight=float(weight)))


def _all_of(record: ArrayRecord, origin: Received) -> bool:
    return all(isinstance(array, WireArray) and array.origin is origin for array in record.values())


def _average_integers(model: dict[str, Numbers], updates_of: list[tuple[float, ArrayRecord]]) -> None:
    """The mean of counters and masks, which `updates.average` leaves as the model has them, rounded to the nearest."""
    total = sum(weight for weight, _ in updates_of)
    for name, array in model.items():
        if array.dtype.kind in "biu":
            mean = sum(weight * record[name].numpy().astype(np.float64) for weight, record in updates_of) / total
            array[...] = rounded(np.asarray(mean), array.dtype)
