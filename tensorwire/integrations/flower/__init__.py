"""Flower with tensorwire on its wire: a line in the server app, a line in the client app.

    strategy.start(grid=WireGrid(grid), initial_arrays=ArrayRecord(model.state_dict()), num_rounds=3)
    app = ClientApp(mods=[wire_mod])                     # the first of its mods

Each `ArrayRecord` of a message travels as one encoded stream: the model down with one codec, what a client changed
in it up with another. Where they arrive, arrays look like Flower's own and are decoded as they are read, so that a
strategy that was never changed holds encoded replies and one decoded tensor. Strategies, mods, `NumPyClient`, the
simulation engine and the deployment engine see what they always saw.

A message that cannot be used becomes an error reply, which strategies count as a failure of its node.
"""

from tensorwire.integrations.flower.arrays import WireArray, to_record, to_state_dict
from tensorwire.integrations.flower.grid import WireGrid
from tensorwire.integrations.flower.mod import wire_mod
from tensorwire.integrations.flower.seams import check_seams
from tensorwire.integrations.flower.strategy import StreamingFedAvg

__all__ = ["StreamingFedAvg", "WireArray", "WireGrid", "to_record", "to_state_dict", "wire_mod"]

check_seams()
