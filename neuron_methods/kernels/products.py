"""Products of matrices in float32."""

from __future__ import annotations

import torch
from torch import Tensor

# torch multiplies float32 matrices by MKL, at half the speed on processors of other makers than Intel: 105 GFLOP/s on a
# core of an AMD EPYC with torch 2.13, where oneDNN has 225. Of oneDNN, torch offers float32 products to its compiler
# alone, by this operation. Where there is none, torch's own is used.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def times(x: Tensor, y: Tensor) -> Tensor:
    """Compute x yᵀ.

    Args:
        x: (n, k).
        y: (m, k), of the same dtype and device.
    """
    if _ONEDNN is None or x.device.type != "cpu" or x.dtype != torch.float32 or 0 in (*x.shape, *y.shape):
        return x @ y.T
    return _ONEDNN(x, y, None, "none", [], "")
