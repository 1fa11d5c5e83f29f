"""Updates of a model: computed, encoded, compressed, checked and averaged. No sockets.

    changed = subtract(trained, base)                    # views, computed slice by slice as they are encoded
    terms = Terms("my run", round=3, client="ann", kind="difference", weight=100)
    message = b"".join(encode(changed, terms, codec="nf4"))

    update = check_update(message, model, expected)      # reads it once, and raises if it is not acceptable
    average([update, ...], into=model)                   # in the memory of the model, for any number of updates

A `Compressor` sends a thousandth of that, and keeps what it leaves out; `combine` adds up the messages of many senders:

    message = Compressor("demo:k=4").compress(gradients)
    combine([message.data, *received], how="present")

Models and updates are mappings of names to tensors, torch or NumPy. `Views` are mappings of names to tensors that are
computed when read, so that functions from views to views (`subtract`, `ErrorFeedback.add`, `stochastic_bf16`) need
no memory for their results and can be chained.
"""

from tensorwire.updates.answer import write_update
from tensorwire.updates.check import Rules, Update, UpdateError, Verdict, ceilings, check_update
from tensorwire.updates.combine import combine
from tensorwire.updates.compressor import Compressor, Message, message_size
from tensorwire.updates.difference import Views, added, proximal, subtract, views
from tensorwire.updates.feedback import ErrorFeedback
from tensorwire.updates.mean import Mean, TrimmedMean, WeightedMean, average
from tensorwire.updates.message import Arrays, arrays, encode, encode_patch, receive, receive_patch, terms_of
from tensorwire.updates.methods import Method
from tensorwire.updates.normalizer import Normalizer
from tensorwire.updates.optimizer import ServerOptimizer
from tensorwire.updates.recording import BoundedRecording
from tensorwire.updates.roles import exact_vectors
from tensorwire.updates.rounding import stochastic_bf16
from tensorwire.updates.states import copies, empty_like, fingerprint, matched
from tensorwire.updates.tensors import is_equal, is_finite, mean_of
from tensorwire.updates.terms import Terms, UpdateKind, as_number, check_weight, finite_metrics
from tensorwire.updates.weighting import LeftOut, clipped_to_median, normalized, without_outliers

__all__ = [
    "Arrays",
    "BoundedRecording",
    "Compressor",
    "ErrorFeedback",
    "LeftOut",
    "Mean",
    "Message",
    "Method",
    "Normalizer",
    "Rules",
    "ServerOptimizer",
    "Terms",
    "TrimmedMean",
    "Update",
    "UpdateError",
    "UpdateKind",
    "Verdict",
    "Views",
    "WeightedMean",
    "added",
    "arrays",
    "as_number",
    "average",
    "ceilings",
    "check_update",
    "check_weight",
    "clipped_to_median",
    "combine",
    "copies",
    "empty_like",
    "encode",
    "encode_patch",
    "exact_vectors",
    "fingerprint",
    "finite_metrics",
    "is_equal",
    "is_finite",
    "matched",
    "mean_of",
    "message_size",
    "normalized",
    "proximal",
    "receive",
    "receive_patch",
    "stochastic_bf16",
    "subtract",
    "terms_of",
    "views",
    "without_outliers",
    "write_update",
]
