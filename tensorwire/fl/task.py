"""Tasks: the three functions that the loop calls, and a small language model as an example.

A task of your own is a function that returns a `Task`, which `load` finds as "module:function". It gets plain
tensors in their own precision, whatever the codecs of the messages.
"""

import importlib
import os
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

State = Mapping[str, Any]
Text = npt.NDArray[np.uint8]

# Files that are not hand-written or not the standard library's: generated tables, vendored trees, installed packages.
_SKIPPED: Final = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
)
_HELD_OUT: Final = 10  # every tenth file of a package is never trained on
_EVALUATED: Final = 128  # windows of held-out text


@dataclass(frozen=True)
class Task:
    """`initial()`: the tensors that training starts from, by name.

    `train(state, client, round)`: returns the state after client number `client` has trained it, its weight in the
    mean (for instance the number of examples) and its metrics. It does not change `state`.
    `evaluate(state)`: the loss on data that no client trains on.
    """

    initial: Callable[[], State]
    train: Callable[[State, int, int], tuple[State, float, dict[str, float]]]
    evaluate: Callable[[State], float]


def load(spec: str) -> Callable[..., Task]:
    """The function that "module:function" names; modules are also found in the current folder. Raises ValueError."""
    module, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:  # installed commands do not search it, `python -m` does
        sys.path.append(os.getcwd())
    try:
        function: Callable[..., Task] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no task {spec!r}; a task is named as module:function ({error})") from error
    return function


def language_model(
    *,
    clients: int = 4,
    seed: int = 0,
    steps: int = 16,
    batch: int = 8,
    context: int = 64,
    hidden: int = 128,
    layers: int = 2,
    rate: float = 3e-3,
    lora: int = 0,
    start: State | None = None,
) -> Task:
    """A byte-level Llama of some 400,000 parameters, trained on the Python standard library.

    Each client has its own packages. A round is `steps` steps of AdamW over `batch` windows of `context` bytes.
    `lora`: rank of adapters (peft) on every linear layer; only these are then trained and sent. `start`: initial
    weights, mainly for adapters; random otherwise, and the same for the same `seed`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
        if start is not None:
            model.load_state_dict(start)
        if lora:
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear")
            model = get_peft_model(model, adapters)
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    texts, held_out = split(clients)

    def set_state(state: State) -> None:
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(state[name])

    def get_state() -> State:
        return {name: tensor.detach().clone() for name, tensor in trained.items()}

    def loss(windows: Text) -> Any:
        tokens = torch.from_numpy(windows.astype(np.int64))
        return model(input_ids=tokens, labels=tokens).loss

    def train(state: State, client: int, round: int) -> tuple[State, float, dict[str, float]]:
        set_state(state)
        model.train()
        draw = np.random.default_rng([seed, client, round])
        optimizer = torch.optim.AdamW(trained.values(), lr=rate)
        text, total = texts[client], 0.0
        for _ in range(steps):
            starts = draw.integers(0, len(text) - context, batch)
            value = loss(np.stack([text[begin : begin + context] for begin in starts]))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += float(value.detach())
        return get_state(), float(steps * batch), {"train_loss": total / steps}

    def evaluate(state: State) -> float:
        set_state(state)
        model.eval()
        starts = np.linspace(0, len(held_out) - context, _EVALUATED).astype(int)
        with torch.no_grad():
            return float(loss(np.stack([held_out[begin : begin + context] for begin in starts])))

    initial = get_state()
    return Task(lambda: initial, train, evaluate)


@cache
def split(clients: int) -> tuple[list[Text], Text]:
    """The standard library's sources as bytes: one text per client, and one that is held out.

    Each package goes to one client, the largest first, always to the client with the least text.
    """
    texts: list[list[bytes]] = [[] for _ in range(clients)]
    held_out: list[bytes] = []
    packages = sorted(_packages().items(), key=lambda package: (-sum(map(len, package[1])), package[0]))
    for _, files in packages:
        poorest = min(texts, key=lambda text: sum(map(len, text)))
        shown = files[::_HELD_OUT] if len(files) > 1 else []
        poorest += [file for file in files if file not in shown]
        held_out += shown
    *shares, rest = (np.frombuffer(b"".join(files), np.uint8) for files in (*texts, held_out))
    return shares, rest


def _packages() -> dict[str, list[bytes]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[bytes]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _SKIPPED.intersection(parts):
            found.setdefault(parts[0], []).append(path.read_bytes())
    return found
