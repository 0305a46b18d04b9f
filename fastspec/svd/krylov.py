"""The leading right subspace of a stack of matrices by block Krylov iteration on W^T W.

Randomised SVD (a few power steps) does not find singular vectors of transformer weights, whose
spectra decay slowly; keeping every block of the iteration as a basis does (design section 4;
Musco and Musco, arXiv 1504.05477; block Lanczos with full reorthogonalisation, Golub and Van Loan,
section 10.3). Narrow blocks need the fewest basis vectors, because they leave more steps for the same
number; the price is that a value of higher multiplicity than the block is wide shows only that many of its
vectors, which `_multiplicity_reaches_width` recognises.

Basis vectors are rows here: the basis [L, p, n] grows by contiguous blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastspec.svd.options import Options
from fastspec.svd.triplets import gram_subspace


def block_width(k: int, short: int, compiled: bool) -> int:
    """Columns multiplied at once.

    Wider costs more basis vectors, narrower more products and, where they come from Python, more calls.
    """
    if compiled:
        return 4 if short <= Options.gram_short else 8
    return 8 if k <= 64 else 16


def worthwhile(k: int, short: int) -> bool:
    """Whether iterating beats the eigenvectors of the whole Gram matrix.

    Slowly decaying spectra need about 3.5 k + 80 basis vectors; measured, the eigenvectors cost the
    same when that is somewhat over half the short side.
    """
    return 3.5 * k + 80 <= 0.55 * short


def most_vectors(w: Tensor, k: int, width: int, workspace: int) -> int:
    """Basis vectors to hold at once so that those of a stack [L, m, n] take up to `workspace` bytes.

    Twice, because a basis that grows or restarts is copied; fewer than 2 k and a few blocks would make no
    progress after a restart.
    """
    short = w.shape[-1]
    fitting = workspace // (2 * w.shape[0] * short * w.element_size())
    return min(short, max(fitting, 2 * k + 8 * width))


def krylov_subspace(
    w: Tensor,  # [L, m, n], m >= n
    options: Options,
    width: int | None = None,
) -> Tensor:  # [L, n, k]
    """Right vectors whose estimated residuals meet `tol`, or the best found within `max_steps`.

    In blocks of `width` columns, more than those of `options` after a first run whose blocks were too narrow.
    """
    short, k = w.shape[-1], options.k
    widened = width is not None
    width = min(width or options.width, short)
    most = max(options.most, k + 2 * width)
    right = w.new_empty(w.shape[0], short, k)
    multiple: list[Tensor] = []
    active = torch.arange(w.shape[0], device=w.device)
    run = _Iteration(w, options, width)
    check = 2 * k + 6 * width + options.first_check
    # (basis vectors made, log10 of the error over the one allowed); before the first check, a guess
    last = (float(k + width), -math.log10(options.tol))
    steps = made = 0
    while active.numel():
        before = run.size
        run.step()
        steps += 1
        made += run.size - before
        stopped = steps == options.max_steps or made > options.restarted_lengths * short
        final = run.size == short or (stopped and run.size >= k)
        full = run.size + run.next.shape[1] > most and run.size < short
        if made < min(check, short) and not final and not full:
            continue
        values, vectors, error = run.ritz(k)
        share = run.share_of_tolerance(values[:, :k], error)  # [A], 1 when converged
        done = share <= 1 if not final else torch.ones_like(share, dtype=torch.bool)
        if done.any():
            right[active[done]] = run.basis[done, : run.size].mT @ vectors[done, :, :k]
            if not final:
                reached = _multiplicity_reaches_width(values[:, :k], width, options)
                multiple.append(active[done & reached])
            active = active[~done]
            values, vectors = values[~done], vectors[~done]
            run.keep(~done)
        if active.numel():
            if full:
                run.restart(values, vectors, (k + run.size) // 2)
            here = (float(made), math.log10(float(share[~done].median())))
            slope = (last[1] - here[1]) / (here[0] - last[0])
            ahead = here[1] / slope if slope > 0 else math.inf
            # a check costs about as much as two steps, a long extrapolation is not to be trusted
            check = made + int(min(max(ahead, 2 * width), 0.3 * made))
            last = here
    for rows in multiple:
        if rows.numel():
            if short <= options.gram_short and widened:  # a third run would cost more
                right[rows] = gram_subspace(w[rows], k).to(w.dtype)
            else:
                right[rows] = krylov_subspace(w[rows], options, min(2 * width, short))
    return right


def _multiplicity_reaches_width(
    values: Tensor,  # [A, k] descending
    width: int,
    options: Options,
) -> Tensor:  # [A]
    """Whether a value of multiplicity `width` is among them: it may have more vectors, not found.

    A start block of b vectors finds at most b vectors of a multiple singular value.
    """
    if values.shape[-1] < width:
        return torch.zeros(values.shape[0], dtype=torch.bool, device=values.device)
    spread = values[:, : values.shape[-1] - width + 1] - values[:, width - 1 :]
    return (spread <= options.coincidence * options.tol * values[:, :1]).any(dim=-1)


class _Iteration:
    """One block Krylov run over a stack: basis Q [A, p, n], T = Q W^T W Q^T [A, p, p], next block."""

    def __init__(self, w: Tensor, options: Options, width: int) -> None:
        self.w = w
        self.options = options
        self.gram = w.mT @ w if w.shape[-1] <= options.gram_short else None
        self.width = width
        self.size = 0
        self.generator = torch.Generator().manual_seed(options.seed)
        count, _, short = w.shape
        start = self._random(width).expand(count, -1, -1)
        self.next = torch.linalg.qr(start.mT)[0].mT  # [A, b, n]
        # [A, c, b] between the last c vectors of the basis and the next block
        self.coupling = w.new_zeros(count, 0, width)
        self.basis = w.new_empty(count, 0, short)
        self.t = w.new_zeros(count, 0, 0)

    def step(self) -> None:
        """Take the next block into the basis, and make the one after it."""
        before, block = self.size, self.next
        self._append(block)
        p, b, c = self.size, block.shape[1], self.coupling.shape[1]
        q, t = self.basis[:, :p], self.t
        t[:, before - c : before, before:p] = self.coupling
        t[:, before:p, before - c : before] = self.coupling.mT
        image = self._squared(block)
        # T is block tridiagonal: what W^T W q has along older blocks is rounding, removed below
        h = image @ q[:, before - c :].mT  # [A, b, c + b]
        t[:, before:p, before:p] = h[:, :, c:]
        room = min(b, q.shape[-1] - p)
        if room:
            rest = image - h @ q[:, before - c :]
            self.next = self._orthonormal(rest)[:, :room]
            self.coupling = rest @ self.next.mT  # [A, b, room]

    def ritz(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenpairs of T and the norms of W^T W v - value v of the first k.

        [A, p] descending, [A, p, p], [A, k].
        """
        p, c = self.size, self.coupling.shape[1]
        values, vectors = torch.linalg.eigh(self.t[:, :p, :p])
        values, vectors = values.flip(-1), vectors.flip(-1)
        if p == self.w.shape[-1]:
            return values, vectors, torch.zeros_like(values[:, :k])
        error = torch.linalg.vector_norm(self.coupling.mT @ vectors[:, p - c :, :k], dim=-2)
        return values, vectors, error

    def restart(self, values: Tensor, vectors: Tensor, kept: int) -> None:
        """The basis becomes its first `kept` Ritz vectors, T their values; `next` stays.

        Thick restart: Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000).
        """
        p, c = self.size, self.coupling.shape[1]
        best = vectors[:, :, :kept]
        self.basis[:, :kept] = best.mT @ self.basis[:, :p]
        self.coupling = best[:, p - c :].mT @ self.coupling
        self.t.zero_()
        self.t[:, :kept, :kept] = torch.diag_embed(values[:, :kept])
        self.size = kept

    def share_of_tolerance(self, values: Tensor, error: Tensor) -> Tensor:
        """Largest error over the one allowed, per matrix.

        The residual is error / s_i, and relative to max(s_i, floor s_1). What rounding leaves in T cannot
        be improved on, so it counts as converged here and the measured residual decides.
        """
        options, finfo = self.options, torch.finfo(values.dtype)
        first = values[:, :1].clamp_min(finfo.tiny)
        least = options.floor * (values.clamp_min(0) * first).sqrt()
        allowed = options.margin * options.tol * torch.maximum(values, least)
        allowed = torch.maximum(allowed, options.stagnation * finfo.eps * first)
        return (error / allowed).amax(dim=-1).clamp_min(1e-30)

    def keep(self, rows: Tensor) -> None:
        """Only the matrices under the mask `rows [A]` go on."""
        self.w, self.basis, self.t = self.w[rows], self.basis[rows], self.t[rows]
        if self.gram is not None:
            self.gram = self.gram[rows]
        self.next, self.coupling = self.next[rows], self.coupling[rows]

    def _squared(self, block: Tensor) -> Tensor:  # [A, b, n] -> [A, b, n]
        if self.gram is not None:
            return block @ self.gram
        return (block @ self.w.mT) @ self.w

    def _append(self, block: Tensor) -> None:
        needed = self.size + block.shape[1]
        count, capacity, short = self.basis.shape
        if needed > capacity:
            grown = min(short, max(2 * capacity, 16 * self.width, needed))
            basis = self.w.new_empty(count, grown, short)
            t = self.w.new_zeros(count, grown, grown)
            basis[:, : self.size] = self.basis[:, : self.size]
            t[:, : self.size, : self.size] = self.t[:, : self.size, : self.size]
            self.basis, self.t = basis, t
        self.basis[:, self.size : needed] = block
        self.size = needed

    def _orthonormal(self, rest: Tensor) -> Tensor:
        """An orthonormal block spanning `rest [A, b, n]`, orthogonal to the basis too.

        `rest` is free of the last two blocks already; here it is freed of the whole basis and twice
        normalised by Cholesky (CholeskyQR2). Where that breaks down, the block has lost rank: the
        subspace is invariant, and random vectors take the empty places.
        """
        q = self.basis[:, : self.size]
        eps = torch.finfo(rest.dtype).eps
        block = rest - (rest @ q.mT) @ q
        broken = torch.zeros(rest.shape[0], dtype=torch.bool, device=rest.device)
        scale = self.t.diagonal(dim1=1, dim2=2).amax(dim=-1)
        negligible = self.options.negligible * eps * scale
        for again in (False, True):
            factor, info = torch.linalg.cholesky_ex(block @ block.mT)
            pivots = factor.diagonal(dim1=1, dim2=2)
            low, high = pivots.aminmax(dim=-1)
            broken |= (info > 0) | ~(low > self.options.breakdown * eps**0.5 * high)
            if not again:
                broken |= ~(low > negligible)
            block = torch.linalg.solve_triangular(factor, block, upper=False)
        for i in broken.nonzero()[:, 0].tolist():
            block[i] = self._repaired(rest[i], q[i], float(negligible[i]))
        return block

    def _repaired(self, rest: Tensor, q: Tensor, negligible: float) -> Tensor:  # [b, n] -> [b, n]
        _, values, rows = torch.linalg.svd(rest, full_matrices=False)
        fresh = torch.nn.functional.normalize(self._random(rest.shape[0]), dim=-1)
        block = torch.where((values > negligible)[:, None], rows, fresh)
        for _ in range(3):
            block = block - (block @ q.mT) @ q
            block = torch.linalg.qr(block.mT)[0].mT
        return block

    def _random(self, rows: int) -> Tensor:
        # drawn on the CPU, so that a device changes nothing
        noise = torch.randn(
            rows, self.w.shape[-1], generator=self.generator, dtype=self.w.dtype, device="cpu"
        )
        return noise.to(self.w.device)
