from pallas_kernels.ssd.api import ssd

__all__ = ["ssd"]
