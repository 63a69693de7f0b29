"""Fused attention with positional biases: scaled_dot_product_attention plus a bias that costs O(N)."""

from .attention import attention
from .biases import DAPE, FIRE, KERPLE, TISA, ALiBi, Bias, RelativeTable, Sandwich, T5Bias
from .feature_maps import Favor
from .floater import FLOATER, MLPDynamics
from .kvcache import attention_with_kvcache
from .linear_attention import LinearState, linear_attention
from .multihead import MultiheadAttention
from .noise import Noise
from .ops import CHECKPOINT_OPS
from .reference import attention_reference
from .sdpa import replace_sdpa
from .spe import ConvSPE, SineSPE
from .spe_codes import Codes
from .varlen import attention_varlen

__version__ = "0.1.0"

__all__ = [
    "CHECKPOINT_OPS",
    "DAPE",
    "FIRE",
    "FLOATER",
    "KERPLE",
    "TISA",
    "ALiBi",
    "Bias",
    "RelativeTable",
    "Sandwich",
    "T5Bias",
    "Codes",
    "ConvSPE",
    "Favor",
    "LinearState",
    "MLPDynamics",
    "MultiheadAttention",
    "Noise",
    "SineSPE",
    "attention",
    "attention_reference",
    "attention_varlen",
    "attention_with_kvcache",
    "linear_attention",
    "replace_sdpa",
]
