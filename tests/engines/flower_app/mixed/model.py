"""A small model with what engines get wrong: a norm and its counter, bfloat16, a tied weight, a scalar, float64."""

import torch
from torch import nn
from torch.nn import functional


class Mixed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(16, width)
        self.norm = nn.BatchNorm1d(width)
        self.middle = nn.Linear(width, width, bias=False)
        self.narrow = nn.Linear(width, 32).to(torch.bfloat16)
        self.wide = nn.Parameter(torch.zeros(32, dtype=torch.float64))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.middle.weight

    def forward(self, batch):
        hidden = functional.relu(self.norm(self.first(batch)))
        hidden = functional.relu(self.tied(self.middle(hidden)))
        return self.narrow(hidden.to(torch.bfloat16)).float() * self.temperature + self.wide.float()


def made(width):
    torch.manual_seed(0)
    return Mixed(width)


def train(model, seed):
    """Two steps on data of one's own. Returns the loss before the last."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(seed)
    batch, labels = torch.randn(8, 16, generator=draw), torch.randint(0, 32, (8,), generator=draw)
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.01), None
    model.train()
    for _ in range(2):
        loss = functional.cross_entropy(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss)
