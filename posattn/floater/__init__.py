"""FLOATER: position vectors that follow a neural ODE, solved once and kept (Liu et al., ICML 2020)."""

from .attachment import Attachment, attach
from .dynamics import MLPDynamics
from .encoder import FLOATER

__all__ = ["FLOATER", "Attachment", "MLPDynamics", "attach"]
