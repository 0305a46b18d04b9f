"""`SpectralLinear`: the drop-in for `nn.Linear` whose spectral coefficients are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastspec.config import Basis, Path, Select
from fastspec.cores import Core
from fastspec.nn.layer import SpectralLayer
from fastspec.svd.factors import Directions, Factors


class SpectralLinear(SpectralLayer, nn.Linear):
    """`nn.Linear` with y = x (W + U C Vh)^T + b: W, U, Vh frozen, the k x k core C trained.

    `weight` [out, in] and `bias` [out] keep their names and values; `delta`, the storage of C in
    float32, starts at zero, so the layer starts as the pretrained one bit for bit. The factors `u`
    [out, k], `s` [k] and `vh` [k, in] are buffers outside the state dict: they are made from the weight.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        rank: directions kept, k <= min(in, out).
        core: "diag" (delta [k]), "band" (delta [2 half_width + 1, k]), "dense" (delta [k, k]) or
            "low_rank" (delta [2 core_rank, k]: two factors, see `fastspec.cores`).
        half_width: diagonals on each side of the main one, for core="band".
        core_rank: rank of C, for core="low_rank".
        select: "leading", "trailing" or a range (start, stop) of singular triplets.
        basis: "svd", or "random": a random orthonormal basis, the control.
        train_bias: whether the bias is trained too.
        tol: relative residual asked of the singular triplets.
        seed: of the factorisation.
        path: "fast" or "reference".

    Source: arXiv 2605.07302; the band is SVFT's (arXiv 2405.19597), the dense core LoRA-XS's
    (arXiv 2405.17604), the low-rank one LoRA's (arXiv 2106.09685) in the coordinates of the basis.

    Raises:
        ValueError: rank or range beyond min(in, out), or a weight that is not finite.
    """

    _plain_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int = 32,
        core: Core = "diag",
        half_width: int = 1,
        core_rank: int = 1,
        select: Select = "leading",
        basis: Basis = "svd",
        train_bias: bool = False,
        tol: float = 1e-5,
        seed: int = 0,
        path: Path = "fast",
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        directions = Directions(rank, select, basis, tol, seed)
        self._attach(directions, core, half_width, core_rank, path, train_bias, None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 32,
        *,
        core: Core = "diag",
        half_width: int = 1,
        core_rank: int = 1,
        select: Select = "leading",
        basis: Basis = "svd",
        train_bias: bool = False,
        tol: float = 1e-5,
        seed: int = 0,
        path: Path = "fast",
        factors: Factors | None = None,
    ) -> SpectralLinear:
        """Adapt an `nn.Linear`: its own weight and bias tensors are adopted, not copied.

        `factors` takes factors made elsewhere; without it the weight is factorised now. The other
        arguments are those of the class.
        """
        return cls.adopt(
            linear,
            directions=Directions(rank, select, basis, tol, seed),
            core=core,
            half_width=half_width,
            core_rank=core_rank,
            path=path,
            train_bias=train_bias,
            factors=factors,
        )

    def to_linear(self) -> nn.Linear:
        """A plain `nn.Linear` that computes the same: the merged weight and the bias, copied."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.effective_weight())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    @staticmethod
    def _matrix(weight: Tensor) -> Tensor:
        return weight

    def _plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
