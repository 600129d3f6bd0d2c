"""CLAM, multiple branches (Lu et al., Nature BME 2021, arXiv 2004.09666): `clam_sb` with one attention per class.

s: (n_out, N) from one gated hidden layer;  a_k = softmax(s_k);  logits_k = w_k^T sum_n a_kn z_n + b_k.  Instance n adds
a_kn w_k^T z_n to logit k, exactly; its share is the mean of its attention over the classes.
"""

from __future__ import annotations

from mhim.mil.models.clam_sb import TUNED, Clam, Params

__all__ = ["TUNED", "Params", "build"]


def build(in_dim: int, n_out: int, params: Params) -> Clam:
    """A new model with fresh weights."""
    return Clam(in_dim, n_out, params, branches=n_out)
