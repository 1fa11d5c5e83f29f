"""Models of the size of real ones, without anything to train."""

import torch


def made(kind, scale):
    """`decoder`: 1.00 GB of float32, a quarter in one embedding; `adapters`: 2,000 tensors of 20 kB; by `scale`."""
    if kind == "adapters":
        shapes = {f"layer.{number}.lora.weight": (1250, 4) for number in range(int(2000 * scale))}
    else:
        shapes = {"embedding.weight": (int(31250 * scale), 2000)}
        for number in range(int(46 * scale)):
            shapes |= {f"layer.{number}.weight": (2000, 2000), f"layer.{number}.norm.weight": (2000,)}
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
