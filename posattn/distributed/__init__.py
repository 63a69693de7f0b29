"""Many devices: the positions of a sequence, the heads or the parameters of a model spread over processes."""

from .context import context_parallel_attention
from .fsdp import fully_shard_bias
from .heads import ShardHeads, shard_heads
from .layout import gather, positions, shard

__all__ = [
    "ShardHeads",
    "context_parallel_attention",
    "fully_shard_bias",
    "gather",
    "positions",
    "shard",
    "shard_heads",
]
