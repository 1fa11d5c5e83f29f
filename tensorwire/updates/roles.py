"""Items of a model that must not be rounded: small ones in which errors do much harm.

A quantizer's error is relative to the largest value of a block. A running variance that it makes negative gives NaN in
the next forward pass, and a norm's gain that is off by a tenth is off for a whole channel.
"""

from collections.abc import Callable
from typing import Any, Final

from tensorwire import codecs
from tensorwire.streams import CodecChoice

# Statistics that layers keep of what they have seen, as torch, Keras and Flax name them.
_STATISTICS: Final = frozenset(
    ("running_mean", "running_var", "num_batches_tracked", "moving_mean", "moving_variance", "mean", "var")
)
_SMALL: Final = 16384  # elements of a vector, a bias or the gain of a norm, that is sent exactly


def exact_vectors(codec: str | codecs.Codec) -> CodecChoice:
    """A codec choice: `codec`, but raw for the statistics of norms, scalars, and vectors of up to 16,384 elements.

    In a model of matrices these are a thousandth of the bytes. A model that is one long vector is sent with `codec`.

        message = encode(subtract(trained, base), terms, codec=exact_vectors("nf4"))
    """
    chosen, raw = codecs.parse(codec), codecs.parse("raw")

    def choose(name: str, tensor: Any) -> codecs.Codec:
        shape = tuple(tensor.shape)
        small = len(shape) == 0 or (len(shape) == 1 and shape[0] <= _SMALL)
        return raw if small or name.replace("/", ".").rpartition(".")[2] in _STATISTICS else chosen

    choice: Callable[[str, Any], codecs.Codec] = choose
    return choice
