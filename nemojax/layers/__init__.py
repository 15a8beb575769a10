"""The layers: a pure function a kind, `f(params, x, state, *, config, segments) -> (y, state)`, and a thin Flax shell.

`state` is None (start from nothing) or what an earlier call returned. A layer without sequence state takes None and
returns None, or what it is worth looking at (`moe` returns its routing).
"""
