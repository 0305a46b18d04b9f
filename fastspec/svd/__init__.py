"""The factors of weights: top-k singular triplets, certified by their residual, and files of them."""

from fastspec.svd.topk import ConvergenceWarning, TopkSVD, topk_svd

__all__ = ["ConvergenceWarning", "TopkSVD", "topk_svd"]
