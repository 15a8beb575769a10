from pallas_kernels.ssd.api import ssd
from pallas_kernels.ssd.step import step_size

__all__ = ["ssd", "step_size"]
