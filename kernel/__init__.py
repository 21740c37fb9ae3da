"""The alignment loss, and the map from hidden states [B, S] to collected states [T]."""

# From here on `kernel.representation_loss` is the function, no longer the module of that name.
from kernel.representation_loss import (
    bytes_moved,
    representation_loss,
    response_index,
    triton_unavailable_reason,
)

__all__ = [
    "bytes_moved",
    "representation_loss",
    "response_index",
    "triton_unavailable_reason",
]
