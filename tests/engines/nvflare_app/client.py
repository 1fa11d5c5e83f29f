"""A client as it would be written without tensorwire."""

import nvflare.client as flare
import torch
from net import Net, train

flare.init()
site = int(flare.get_site_name().removeprefix("site-"))
net = Net()
while flare.is_running():
    received = flare.receive()
    assert received.params["head.weight"] is received.params["embedding.weight"]
    net.load_state_dict(received.params)
    for tensor in received.params.values():  # what becomes of it must not matter
        tensor.zero_()
    with torch.no_grad():
        train(net.state_dict(), site)
    meta = {"NUM_STEPS_CURRENT_ROUND": 10 * site}
    flare.send(flare.FLModel(params=net.state_dict(), metrics={"accuracy": 0.25 * site}, meta=meta))
