from pallas_kernels.causal_conv1d.api import causal_conv1d
from pallas_kernels.causal_conv1d.xla import last_inputs

__all__ = ["causal_conv1d", "last_inputs"]
