"""Expert dispatch: how rows meet the experts that the router chose. One strategy a file, one per-shard signature:

`dispatch(x [R, L], ids [R, K], weights [R, K], up [E, F, L], down [E, F, L]) -> y [R, L] float32`,
with `y[r] = sum_k weights[r, k] * expert_{ids[r, k]}(x[r])`. No strategy drops a row.
"""
