from pallas_kernels.expert_mlp.api import expert_mlp, takes_kernels, token_mlp

__all__ = ["expert_mlp", "takes_kernels", "token_mlp"]
