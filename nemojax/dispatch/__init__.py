"""Expert dispatch: how rows meet the experts that the router chose. One strategy a file, one per-shard signature:

`dispatch(x [R, L], ids [R, K], weights [R, K], up [E, F, L], down [E, F, L]) -> y [R, L] float32`,
with `y[r] = sum_k weights[r, k] * expert_{ids[r, k]}(x[r])`. No strategy drops a row, and none computes an expert for a
row that did not choose it: where a bounded buffer would overflow, there is another round.

  local        every expert is on this shard
  same_rows    experts are split, every shard has the same rows: each adds what its experts give
  ring         experts and rows are split: rows are gathered from all shards, sums are scattered back
  all_to_all   experts and rows are split: a row travels only to shards that have one of its experts
"""

from nemojax.dispatch.choose import check, dispatch

__all__ = ["check", "dispatch"]
