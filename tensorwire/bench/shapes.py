"""Models by name: only their shapes, so that a billion parameters cost nothing to talk about."""

from typing import Final

Shapes = dict[str, tuple[int, ...]]


def llama(*, vocabulary: int, hidden: int, layers: int, feed_forward: int, key_value: int) -> Shapes:
    """Items of a Llama-family state dict in their order, with an untied output head."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (key_value, hidden),
            prefix + "self_attn.v_proj.weight": (key_value, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "mlp.gate_proj.weight": (feed_forward, hidden),
            prefix + "mlp.up_proj.weight": (feed_forward, hidden),
            prefix + "mlp.down_proj.weight": (hidden, feed_forward),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


NAMED: Final[dict[str, Shapes]] = {
    # 22 MiB of fp32: what a bare `tensorwire bench` sends.
    "llama-tiny": llama(vocabulary=4096, hidden=256, layers=4, feed_forward=1024, key_value=64),
    # What DisTrO's published run trained: 1,204,881,408 parameters.
    "llama-2-1.2b": llama(vocabulary=32000, hidden=2048, layers=16, feed_forward=8192, key_value=2048),
    # Llama-3.2-1B as federated-learning papers count it: 147 items, 1,498,482,688 parameters.
    "llama-3.2-1b": llama(vocabulary=128256, hidden=2048, layers=16, feed_forward=8192, key_value=512),
}
