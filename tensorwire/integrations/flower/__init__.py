"""Flower with encoded messages: one line in the server app, one in the client app.

    strategy.start(grid=WireGrid(grid), initial_arrays=ArrayRecord(model.state_dict()), num_rounds=3)
    app = ClientApp(mods=[wire_mod])                     # the first of its mods

Each `ArrayRecord` of a message is sent as one encoded stream: the model down with one codec, a client's changes up with
another. Received arrays look like Flower's own and are decoded when they are read, so that an unchanged strategy holds
encoded replies and one decoded tensor. Strategies, mods, `NumPyClient`, the simulation engine and the deployment
engine work unchanged.

An unusable message becomes an error reply, which strategies count as a failure of its node.
"""

from tensorwire.integrations.flower.arrays import WireArray, to_record, to_state_dict
from tensorwire.integrations.flower.grid import WireGrid
from tensorwire.integrations.flower.mod import wire_mod
from tensorwire.integrations.flower.seams import check_seams
from tensorwire.integrations.flower.strategy import StreamingFedAvg

__all__ = ["StreamingFedAvg", "WireArray", "WireGrid", "to_record", "to_state_dict", "wire_mod"]

check_seams()
