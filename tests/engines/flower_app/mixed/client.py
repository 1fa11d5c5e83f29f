import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from mixed.model import made, train
from tensorwire.integrations.flower import to_record, to_state_dict, wire_mod

app = ClientApp(mods=[wire_mod])


@app.train()
def fit(message, context):
    node, turn = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
    folder = str(context.run_config["folder"])
    model = made(int(context.run_config["width"]))
    state = model.state_dict()
    to_state_dict(message.content["arrays"], into=state)
    torch.save(state, f"{folder}/received-{turn}-{node}.pt")
    loss = train(model, 10 * turn + node)
    torch.save(model.state_dict(), f"{folder}/trained-{turn}-{node}.pt")
    metrics = MetricRecord({"num-examples": node + 1, "loss": loss})
    return Message(RecordDict({"arrays": to_record(model.state_dict()), "metrics": metrics}), reply_to=message)
