from pallas_kernels.expert_mlp.api import expert_mlp, gather_rows, takes_kernels, token_mlp

__all__ = ["expert_mlp", "gather_rows", "takes_kernels", "token_mlp"]
