"""Biases by position: one method a file, the contract in bias.py."""

from .alibi import ALiBi
from .bias import Bias, Scaled
from .dape import DAPE
from .fire import FIRE
from .kerple import KERPLE
from .relative_table import RelativeTable
from .sandwich import Sandwich
from .t5 import T5Bias
from .tisa import TISA

__all__ = ["DAPE", "FIRE", "KERPLE", "TISA", "ALiBi", "Bias", "RelativeTable", "Sandwich", "Scaled", "T5Bias"]
