from pallas_kernels.mamba_step.api import mamba_step

__all__ = ["mamba_step"]
