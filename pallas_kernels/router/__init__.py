from pallas_kernels.router.api import Rule, choose_experts

__all__ = ["Rule", "choose_experts"]
