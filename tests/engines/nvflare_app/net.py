"""The model of the engine tests: what models are made of and engines stumble over."""

import torch


class Net(torch.nn.Module):
    """Matrices, a norm with its counter, bf16, a tied head, a scalar, bools.

    Always with the same values: FLARE writes down what a model is made with and makes another one on the server.
    """

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width = width
        self.embedding = torch.nn.Embedding(6000, width)
        self.norm = torch.nn.BatchNorm1d(width)
        self.hidden = torch.nn.Linear(width, 4 * width)
        self.half = torch.nn.Linear(width, width, dtype=torch.bfloat16)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.head = torch.nn.Linear(width, 6000, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.arange(7) % 2 == 0)


def train(state: dict[str, torch.Tensor], site: int) -> None:
    """One step of a client, in place, the same wherever it is done."""
    generator = torch.Generator().manual_seed(site)
    for name, tensor in state.items():
        if tensor.dtype == torch.int64:
            tensor += site
        elif tensor.is_floating_point() and name != "head.weight":
            tensor += (0.01 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
