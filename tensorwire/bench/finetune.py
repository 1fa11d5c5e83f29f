"""A minute of fine-tuning all-MiniLM-L6-v2 on the docstrings of the standard library, for real updates.

Sentences that follow one another are to have embeddings near one another (a contrastive loss, Adam): as in practice,
word embeddings get gradients only for the words that occur, so that almost half of the update is zeros.
"""

import ast
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from tensorwire.bench.models import Model, Weights, read_all

STEPS: Final = 60
_PAIRS: Final = 12
_TOKENS: Final = 24
_LAYERS: Final = 6
_HEADS: Final = 12
_LEARNING_RATE: Final = 2e-5
_TEMPERATURE: Final = 0.05
_START, _END, _UNKNOWN = 101, 102, 100


def updates(model: Model, steps: int = STEPS) -> Weights:
    """New weights minus old ones in float32, one tensor behind the other. Takes torch and the model's vocabulary."""
    training = Training(model)
    old = {name: weight.detach().clone() for name, weight in training.weights.items()}
    training.run(steps)
    return np.concatenate([(training.weights[name].detach() - old[name]).flatten().numpy() for name in old])


class Training:
    """The model's floats under Adam, `weights` by name, as `dtype`: float32, as masters are, or bfloat16 alone."""

    def __init__(self, model: Model, dtype: str = "float32") -> None:
        import torch

        assert model.path is not None
        vocabulary = Path(model.path).with_name("vocab.txt").read_text(encoding="utf-8").splitlines()
        self._pairs = _pairs({word: number for number, word in enumerate(vocabulary)})
        torch.manual_seed(0)
        self.weights: dict[str, Any] = {
            name: torch.from_numpy(read_all(view).view(np.float32).reshape(view.shape).copy())
            .to(getattr(torch, dtype))
            .requires_grad_()
            for name, view in model.tensors.items()
            if view.dtype.name == "float32"
        }
        self._optimizer = torch.optim.Adam(self.weights.values())

    def run(self, steps: int, learning_rate: float = _LEARNING_RATE) -> None:
        """Change the weights by so many steps."""
        import torch

        self._optimizer.param_groups[0]["lr"] = learning_rate
        for _ in range(steps):
            batch = torch.tensor([next(self._pairs) for _ in range(_PAIRS)])
            embedded = _embedded(self.weights, batch.flatten(0, 1)).unflatten(0, (_PAIRS, 2))
            likeness = embedded[:, 0] @ embedded[:, 1].T / _TEMPERATURE
            self._optimizer.zero_grad()
            loss: Any = torch.nn.functional.cross_entropy(likeness, torch.arange(_PAIRS))
            loss.backward()
            self._optimizer.step()


def _embedded(weights: dict[str, Any], tokens: Any) -> Any:
    """Unit vectors for rows of tokens, by the model's own arithmetic (BERT, mean of the last layer)."""
    from torch.nn import functional

    def dense(name: str, x: Any) -> Any:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def normal(name: str, x: Any) -> Any:
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    def heads(x: Any) -> Any:
        return x.unflatten(-1, (_HEADS, -1)).transpose(1, 2)

    x = weights["embeddings.word_embeddings.weight"][tokens]
    x = x + weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = normal("embeddings.LayerNorm", x + weights["embeddings.token_type_embeddings.weight"][0])
    for layer in range(_LAYERS):
        name = f"encoder.layer.{layer}"
        parts = [heads(dense(f"{name}.attention.self.{part}", x)) for part in ("query", "key", "value")]
        mixed = functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        x = normal(f"{name}.attention.output.LayerNorm", x + dense(f"{name}.attention.output.dense", mixed))
        wide = functional.gelu(dense(f"{name}.intermediate.dense", x))
        x = normal(f"{name}.output.LayerNorm", x + dense(f"{name}.output.dense", wide))
    return functional.normalize(x.mean(1), dim=-1)


def _pairs(vocabulary: dict[str, int]) -> Iterator[tuple[list[int], list[int]]]:
    """Two runs of tokens that follow one another, of the same number each; for ever."""
    while True:
        for text in _docstrings():
            tokens = [token for word in text.lower().split() for token in _pieces(word, vocabulary)]
            size = _TOKENS - 2
            for at in range(0, len(tokens) - 2 * size + 1, 2 * size):
                halves = tokens[at : at + size], tokens[at + size : at + 2 * size]
                yield [_START, *halves[0], _END], [_START, *halves[1], _END]


def _pieces(word: str, vocabulary: dict[str, int]) -> Iterator[int]:
    """The longest parts of a word that the vocabulary has, from its beginning (WordPiece)."""
    at = 0
    while at < len(word):
        mark = "##" if at else ""
        end = next((end for end in range(len(word), at, -1) if mark + word[at:end] in vocabulary), 0)
        yield vocabulary[mark + word[at:end]] if end else _UNKNOWN
        at = end or len(word)


def _docstrings() -> Iterator[str]:
    folder = sysconfig.get_paths()["stdlib"]
    for name in sorted(name for name in os.listdir(folder) if name.endswith(".py")):
        tree = ast.parse(Path(folder, name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield ast.get_docstring(node) or ""
