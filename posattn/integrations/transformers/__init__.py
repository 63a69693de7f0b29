"""posattn in models of Hugging Face transformers (5, and the last of 4): ``pip install posattn[transformers]``.

Importing this module registers the attention implementation "posattn", which every model that calls transformers'
attention interface takes by name. It also teaches it to models that do not call the interface: see `adapters`.

    >>> import posattn.integrations.transformers as integration
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=4, num_key_value_heads=2, attn_implementation="posattn")
    >>> model = LlamaForCausalLM(config)

`attach` gives the layers biases, which train, are saved and loaded with the model; `detach` takes them away.

    >>> from posattn import TISA
    >>> model = integration.attach(model, lambda layer, heads: TISA(heads), positions="drop")
    >>> model.model.layers[0].self_attn.position_bias
    TISA(num_heads=4, num_kernels=5)
    >>> model = integration.detach(model)
"""

from . import adapters as _adapters
from . import rebuilding as _rebuilding
from .attachment import attach, detach
from .interface import NAME, attention_forward, register
from .masks import key_mask
from .specification import register_bias

register()
_adapters.install()
_rebuilding.install()

__all__ = ["NAME", "attach", "attention_forward", "detach", "key_mask", "register_bias"]
