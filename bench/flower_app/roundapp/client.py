import torch  # noqa: F401 - Flower makes tensors where it finds it loaded
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tensorwire.integrations.flower import to_record, to_state_dict, wire_mod

app = ClientApp(mods=[wire_mod])


@app.train()
def fit(message, context):
    """A step in place of training; one that differs between nodes, as Flower stores equal replies once."""
    step = 0.25 + 0.5 * context.node_config["partition-id"]
    arrays = message.content["arrays"]
    ours = context.run_config["side"] == "ours"
    state = to_state_dict(arrays) if ours else arrays.to_torch_state_dict(keep_input=False)
    for tensor in state.values():
        tensor += step
    record = to_record(state) if ours else ArrayRecord(state, keep_input=False)
    return Message(RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
