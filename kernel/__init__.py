"""The alignment loss."""

# From here on `kernel.representation_loss` is the function, no longer the module of that name.
from kernel.representation_loss import (
    bytes_moved,
    representation_loss,
    triton_unavailable_reason,
)

__all__ = [
    "bytes_moved",
    "representation_loss",
    "triton_unavailable_reason",
]
