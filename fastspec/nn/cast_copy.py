"""`CastCopy`: a layer's frozen matrices in autocast's dtype, kept between calls.

Autocast casts a weight anew in every pass unless it is trained. For frozen ones that is most of what a GPU
then does in a small layer, and no kernel serves a weight wider than x. A copy costs half the float32 weight
in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastspec.nn.made_from import Seen
from fastspec.ops import cuda


class CastCopy:
    """weight as it is stored, u [out, k] and vh [k, in] of one layer in another dtype.

    Copies and pickles of a layer have none: they make their own.
    """

    def __init__(self, weight: Tensor, u: Tensor, vh: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._seen = tuple(map(Seen, (weight, u, vh)))
        with torch.no_grad(), torch.inference_mode(False):  # kept beyond it, for training too
            self.weight, self.u, self.vh = (t.detach().to(dtype) for t in (weight, u, vh))

    def serves(self, weight: Tensor, u: Tensor, vh: Tensor, dtype: torch.dtype) -> bool:
        """Whether it is of these matrices as they are."""
        unchanged = (seen.unchanged(t) for seen, t in zip(self._seen, (weight, u, vh), strict=True))
        return dtype == self.dtype and all(unchanged)

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


def wanted_dtype(weight: Tensor) -> torch.dtype | None:
    """The dtype in which copies of a layer's frozen matrices are wanted; None: none are.

    On a CPU none: there the merged weight is made in float32, and rounded once.
    """
    device = weight.device
    if (
        not torch.is_autocast_enabled(device.type)
        or torch.compiler.is_compiling()
        or weight.requires_grad
        or not cuda.serves(device)
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    dtype = torch.get_autocast_dtype(device.type)
    return dtype if weight.dtype == torch.float32 and dtype.itemsize == 2 else None
