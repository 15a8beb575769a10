"""Kernels for one shard: they know no mesh and no model configuration.

Every operation is a folder: `api.py` (the public function and the choice of implementation), `reference.py` (slow and
obvious, the executable specification), `xla.py` (fast everywhere, plain JAX).
"""
