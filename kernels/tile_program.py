"""The tile program of forward and backward, as the Triton kernels that `spectral_linear` launches.

Both kernels are  out = A B + core(A V) C  with (A, B, V, C) = (x, W^T, Vh^T, U^T) or (g, W, U, Vh). A program
owns BLOCK_M rows. The walk over the depth of its first output tile also accumulates the projection
A V, which then stays in registers and enters every output tile as one more step of its float32
accumulator (design section 3). Ranks above what registers hold are projected beforehand and arrive
with the core applied (CORE="precomputed"), BLOCK_R columns at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastspec.kernels.sigma_grad import reduce_gradient, rounded


# fmt: off
@triton.jit
def offsets(M: tl.constexpr, stride_m, N: tl.constexpr, stride_n, WIDE: tl.constexpr):
    """m stride_m + n stride_n  [M, N]: a tile's element offsets.

    Bases are 64-bit, these only where a tile spans 2^31 (WIDE).
    """
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    if WIDE:
        m = m.to(tl.int64)
        n = n.to(tl.int64)
    return m[:, None] * stride_m + n[None, :] * stride_n


@triton.jit
def apply_core(
    proj,             # [BLOCK_M, BLOCK_R] float32, p or q
    delta_ptr,        # float32 contiguous: [K], [TASKS, K] or [K, K]
    task_ptr,         # [N] contiguous; CORE="task" only
    row0,             # the tile's first row
    row_ok,           # [BLOCK_M]
    rank_ok,          # [BLOCK_R]
    K, TASKS,
    CORE: tl.constexpr, FORWARD: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):
    """core(p) = p C^T forward, core(q) = q C backward  [BLOCK_M, BLOCK_R], in the matrix units' dtype."""
    ranks = tl.arange(0, proj.shape[1])
    if CORE == "diag":
        delta = tl.load(delta_ptr + ranks, mask=rank_ok, other=0.0)  # [BLOCK_R]
        scaled = proj * delta[None, :]
    elif CORE == "task":
        rows = tl.arange(0, proj.shape[0])
        task = tl.load(task_ptr + row0 + rows, mask=row_ok, other=0).to(tl.int64)  # [BLOCK_M]
        adapted = (task >= 0)[:, None] & rank_ok[None, :]
        # a task beyond the table makes its row NaN instead of reading foreign memory
        known = adapted & (task < TASKS)[:, None]
        delta = tl.load(delta_ptr + task[:, None] * K + ranks[None, :], mask=known, other=float("nan"))
        scaled = tl.where(adapted, proj * delta, 0.0)
    else:  # dense
        i = ranks[None, :] if FORWARD else ranks[:, None]
        j = ranks[:, None] if FORWARD else ranks[None, :]
        core = tl.load(delta_ptr + i * K + j, mask=rank_ok[:, None] & rank_ok[None, :], other=0.0)
        proj = rounded(proj.to(DTYPE), PRECISION)
        scaled = tl.dot(proj, rounded(core.to(DTYPE), PRECISION), input_precision=PRECISION)
    return rounded(scaled.to(DTYPE), PRECISION)


@triton.jit
def through_registers(t, TRANSPOSED: tl.constexpr):
    """t itself; where it lies TRANSPOSED in memory, with its depth strided, by way of registers.

    wgmma and tcgen05 read 4-byte operands with the depth contiguous only. A tile whose rows run the other
    way would be transposed by its copies into shared memory, 4 bytes each. What arithmetic has touched comes
    from registers: the copies are of 16 bytes then, and the tile is transposed on its way back. What is to be
    done there is rounding.
    """
    return rounded(t, "tf32") if TRANSPOSED else t


@triton.jit
def walk(
    a_base, b_base, v_base,  # the first tile of each operand
    a_offs,           # [BLOCK_M, BLOCK_K]
    b_offs,           # [BLOCK_K, BLOCK_N]
    v_offs,           # [BLOCK_K, BLOCK_R]
    a_step, b_step, v_step,  # elements from one step of the depth to the next
    row_ok,           # [BLOCK_M]
    col_ok,           # [BLOCK_N]
    rank_ok,          # [BLOCK_R]
    D,                # the depth
    PROJECT: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A B  [BLOCK_M, BLOCK_N] and, with PROJECT, A V  [BLOCK_M, BLOCK_R], from one load of A; float32."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    proj = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    depth = tl.arange(0, BLOCK_K)
    for d in range(0, D, BLOCK_K):
        d_ok = depth < D - d
        a = tl.load(a_base + a_offs, mask=row_ok[:, None] & d_ok[None, :], other=0.0)
        b = tl.load(b_base + b_offs, mask=d_ok[:, None] & col_ok[None, :], other=0.0)
        acc = tl.dot(a, through_registers(b, TRANSPOSED), acc, input_precision=PRECISION)
        if PROJECT:
            v = tl.load(v_base + v_offs, mask=d_ok[:, None] & rank_ok[None, :], other=0.0)
            proj = tl.dot(a, through_registers(v, TRANSPOSED), proj, input_precision=PRECISION)
            v_base += v_step
        a_base += a_step
        b_base += b_step
    return acc, proj


@triton.jit
def add_correction(
    acc,              # [BLOCK_M, BLOCK_N] float32
    scaled,           # [BLOCK_M, BLOCK_R], core(A V); not with CORE="precomputed"
    precomputed_base,  # [BLOCK_M, K] contiguous, core(A V); CORE="precomputed" only
    c_base,           # [K, BLOCK_N]
    stride_cr, stride_cn,
    row_ok,           # [BLOCK_M]
    col_ok,           # [BLOCK_N]
    K,
    CORE: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """acc + core(A V) C  [BLOCK_M, BLOCK_N]; the thin product's operands are in the input's dtype."""
    ranks = tl.arange(0, BLOCK_R)
    c_offs = offsets(BLOCK_R, stride_cr, BLOCK_N, stride_cn, WIDE)
    if CORE == "precomputed":
        s_offs = offsets(BLOCK_M, K, BLOCK_R, 1, WIDE)
        for r in range(0, K, BLOCK_R):
            r_ok = ranks < K - r
            s = tl.load(precomputed_base + s_offs, mask=row_ok[:, None] & r_ok[None, :], other=0.0)
            c = tl.load(c_base + c_offs, mask=r_ok[:, None] & col_ok[None, :], other=0.0)
            acc = tl.dot(s, through_registers(c, TRANSPOSED), acc, input_precision=PRECISION)
            precomputed_base += BLOCK_R
            c_base += tl.full([], BLOCK_R, tl.int64) * stride_cr
    else:
        c = tl.load(c_base + c_offs, mask=(ranks < K)[:, None] & col_ok[None, :], other=0.0)
        acc = tl.dot(scaled, through_registers(c, TRANSPOSED), acc, input_precision=PRECISION)
    return acc


@triton.jit
def spectral_linear_fwd_kernel(
    x_ptr,            # [N, IN]
    w_ptr,            # [OUT, IN]
    bias_ptr,         # [OUT] contiguous; BIAS only
    u_ptr,            # [OUT, K]
    vh_ptr,           # [K, IN]
    delta_ptr,        # float32 contiguous: [K], [TASKS, K] or [K, K]
    task_ptr,         # [N] contiguous; CORE="task" only
    precomputed_ptr,  # [N, K] contiguous; CORE="precomputed" only
    y_ptr,            # [N, OUT] contiguous
    p_ptr,            # [N, K] contiguous; not with CORE="precomputed"
    N, IN, OUT, K, TASKS, tiles_each,
    stride_xn, stride_xi, stride_wo, stride_wi, stride_uo, stride_uk, stride_vk, stride_vi,
    CORE: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y = x W^T + b + core(p) U^T  with  p = x Vh^T, which is stored."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    split = tl.program_id(1)
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    row_ok = tl.arange(0, BLOCK_M) < N - row0
    rank_ok = tl.arange(0, BLOCK_R) < K
    step = tl.full([], BLOCK_K, tl.int64)
    x_base = x_ptr + row0 * stride_xn
    x_offs = offsets(BLOCK_M, stride_xn, BLOCK_K, stride_xi, WIDE)  # [BLOCK_M, BLOCK_K]
    w_offs = offsets(BLOCK_K, stride_wi, BLOCK_N, stride_wo, WIDE)  # [BLOCK_K, BLOCK_N]
    vh_offs = offsets(BLOCK_K, stride_vi, BLOCK_R, stride_vk, WIDE)  # [BLOCK_K, BLOCK_R]
    scaled = tl.zeros([BLOCK_M, BLOCK_R], dtype=dtype)
    first = split * tiles_each
    last = min(first + tiles_each, tl.cdiv(OUT, BLOCK_N))
    for tile in range(first, last):
        col0 = tl.full([], BLOCK_N, tl.int64) * tile
        col_ok = tl.arange(0, BLOCK_N) < OUT - col0
        w_base = w_ptr + col0 * stride_wo
        if CORE != "precomputed" and tile == first:
            acc, p = walk(
                a_base=x_base, b_base=w_base, v_base=vh_ptr,
                a_offs=x_offs, b_offs=w_offs, v_offs=vh_offs,
                a_step=step * stride_xi, b_step=step * stride_wi, v_step=step * stride_vi,
                row_ok=row_ok, col_ok=col_ok, rank_ok=rank_ok, D=IN,
                PROJECT=True, PRECISION=PRECISION, TRANSPOSED=TRANSPOSED,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K,
            )
            if split == 0:
                p_offs = offsets(BLOCK_M, K, BLOCK_R, 1, False)
                p_ok = row_ok[:, None] & rank_ok[None, :]
                tl.store(p_ptr + row0 * K + p_offs, p.to(dtype), mask=p_ok)
            scaled = apply_core(
                p, delta_ptr, task_ptr, row0=row0, row_ok=row_ok, rank_ok=rank_ok, K=K, TASKS=TASKS,
                CORE=CORE, FORWARD=True, PRECISION=PRECISION, DTYPE=dtype,
            )
        else:
            acc, _ = walk(
                a_base=x_base, b_base=w_base, v_base=vh_ptr,
                a_offs=x_offs, b_offs=w_offs, v_offs=vh_offs,
                a_step=step * stride_xi, b_step=step * stride_wi, v_step=step * stride_vi,
                row_ok=row_ok, col_ok=col_ok, rank_ok=rank_ok, D=IN,
                PROJECT=False, PRECISION=PRECISION, TRANSPOSED=TRANSPOSED,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K,
            )
        acc = add_correction(
            acc, scaled, precomputed_base=precomputed_ptr + row0 * K, c_base=u_ptr + col0 * stride_uo,
            stride_cr=stride_uk, stride_cn=stride_uo, row_ok=row_ok, col_ok=col_ok, K=K,
            CORE=CORE, PRECISION=PRECISION, TRANSPOSED=TRANSPOSED, WIDE=WIDE,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R,
        )
        if BIAS:
            bias = tl.load(bias_ptr + col0 + tl.arange(0, BLOCK_N), mask=col_ok, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        y_ptrs = y_ptr + row0 * OUT + col0 + offsets(BLOCK_M, OUT, BLOCK_N, 1, WIDE)
        tl.store(y_ptrs, acc.to(dtype), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def spectral_linear_bwd_kernel(
    g_ptr,            # [N, OUT], dL/dy
    p_ptr,            # [N, K] contiguous; GRAD only
    w_ptr,            # [OUT, IN]
    u_ptr,            # [OUT, K]
    vh_ptr,           # [K, IN]
    delta_ptr,        # float32 contiguous: [K], [TASKS, K] or [K, K]
    task_ptr,         # [N] contiguous; CORE="task" only
    precomputed_ptr,  # [N, K] contiguous; CORE="precomputed" only
    dx_ptr,           # [N, IN] contiguous
    shares_ptr,       # float32, as in `reduce_gradient`, a slot a row tile; GRAD only
    N, IN, OUT, K, TASKS, tiles_each,
    stride_gn, stride_go, stride_wo, stride_wi, stride_uo, stride_uk, stride_vk, stride_vi,
    CORE: tl.constexpr, GRAD: tl.constexpr,
    PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dx = g W + core(q) Vh  with  q = g U, and from q and p the row tile's share of d delta."""
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    slot = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row0 = slot * BLOCK_M
    row_ok = tl.arange(0, BLOCK_M) < N - row0
    rank_ok = tl.arange(0, BLOCK_R) < K
    step = tl.full([], BLOCK_K, tl.int64)
    g_base = g_ptr + row0 * stride_gn
    g_offs = offsets(BLOCK_M, stride_gn, BLOCK_K, stride_go, WIDE)  # [BLOCK_M, BLOCK_K]
    w_offs = offsets(BLOCK_K, stride_wo, BLOCK_N, stride_wi, WIDE)  # [BLOCK_K, BLOCK_N]
    u_offs = offsets(BLOCK_K, stride_uo, BLOCK_R, stride_uk, WIDE)  # [BLOCK_K, BLOCK_R]
    scaled = tl.zeros([BLOCK_M, BLOCK_R], dtype=dtype)
    first = split * tiles_each
    last = min(first + tiles_each, tl.cdiv(IN, BLOCK_N))
    for tile in range(first, last):
        col0 = tl.full([], BLOCK_N, tl.int64) * tile
        col_ok = tl.arange(0, BLOCK_N) < IN - col0
        w_base = w_ptr + col0 * stride_wi
        if CORE != "precomputed" and tile == first:
            acc, q = walk(
                a_base=g_base, b_base=w_base, v_base=u_ptr,
                a_offs=g_offs, b_offs=w_offs, v_offs=u_offs,
                a_step=step * stride_go, b_step=step * stride_wo, v_step=step * stride_uo,
                row_ok=row_ok, col_ok=col_ok, rank_ok=rank_ok, D=OUT,
                PROJECT=True, PRECISION=PRECISION, TRANSPOSED=TRANSPOSED,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K,
            )
            if GRAD and split == 0:
                reduce_gradient(
                    q, p_ptr, shares_ptr, slot=slot, row0=row0, row_ok=row_ok, rank0=0, rank_ok=rank_ok,
                    K=K, CORE=CORE, PRECISION=PRECISION,
                )
            scaled = apply_core(
                q, delta_ptr, task_ptr, row0=row0, row_ok=row_ok, rank_ok=rank_ok, K=K, TASKS=TASKS,
                CORE=CORE, FORWARD=False, PRECISION=PRECISION, DTYPE=dtype,
            )
        else:
            acc, _ = walk(
                a_base=g_base, b_base=w_base, v_base=u_ptr,
                a_offs=g_offs, b_offs=w_offs, v_offs=u_offs,
                a_step=step * stride_go, b_step=step * stride_wo, v_step=step * stride_uo,
                row_ok=row_ok, col_ok=col_ok, rank_ok=rank_ok, D=OUT,
                PROJECT=False, PRECISION=PRECISION, TRANSPOSED=TRANSPOSED,
                BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K,
            )
        acc = add_correction(
            acc, scaled, precomputed_base=precomputed_ptr + row0 * K, c_base=vh_ptr + col0 * stride_vi,
            stride_cr=stride_vk, stride_cn=stride_vi, row_ok=row_ok, col_ok=col_ok, K=K,
            CORE=CORE, PRECISION=PRECISION, TRANSPOSED=TRANSPOSED, WIDE=WIDE,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R,
        )
        dx_ptrs = dx_ptr + row0 * IN + col0 + offsets(BLOCK_M, IN, BLOCK_N, 1, WIDE)
        tl.store(dx_ptrs, acc.to(dtype), mask=row_ok[:, None] & col_ok[None, :])
# fmt: on
