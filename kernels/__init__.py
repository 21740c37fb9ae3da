"""The alignment loss and the row map that joins dense hidden states with packed collected states."""
# from here on kernels.representation_loss is the function; the module is sys.modules["kernels.representation_loss"]
from kernels.representation_loss import bytes_moved, representation_loss, response_index, why_not_triton

__all__ = ["bytes_moved", "representation_loss", "response_index", "why_not_triton"]
