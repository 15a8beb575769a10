"""Kernels for one shard: they know no mesh and no model configuration.

Every operation is a folder: `api.py` (the public function and the choice of implementation), `reference.py` (slow and
obvious, the executable specification), `xla.py` (fast everywhere, plain JAX), `mosaic_*.py` (Hopper: Pallas, Mosaic
GPU) and, where that takes more than a function, `tuning.py` (how those cut their work).

Dimensions, in the annotations and everywhere else:

    B batch    T tokens    S slots of keys    D width of the model
    H heads, of each group where there are groups    P head dimension    N state size    G groups
    E experts    F width of an expert    L width of its rows, D or a latent one    K experts of a token    R rows
    W taps of a convolution    C its channels    X all that a projection gives    I inner width, H P

Derivatives: every implementation has first ones, in reverse mode. Forward mode and higher ones are those of the
references, which are plain JAX throughout. Inside `jax.shard_map` call operations with `check_vma=False`: their loops
start from constants, which the check would want marked as varying.
"""
