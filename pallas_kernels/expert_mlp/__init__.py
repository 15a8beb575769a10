from pallas_kernels.expert_mlp.api import expert_mlp, token_mlp

__all__ = ["expert_mlp", "token_mlp"]
