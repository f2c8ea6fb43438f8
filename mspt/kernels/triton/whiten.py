"""The whitened norm of vectors: sums over an atom's channels, the 3 × 3 algebra, and the product, three kernels a way.

The algebra is scalar work in float64, one atom a thread; were it part of the other kernels, every thread of an atom
would repeat it. Sums and products are in float64 too: where atoms lie in a plane the transform is large along its
normal, and float32 would lose digits.

Legend: n atoms, F channels, V centred vectors, C their covariance (regularised), T = C^{-1/2}. Per-atom numbers are
kept as [numbers, n], so that neighbouring threads read neighbouring words.
"""

import torch
import triton
import triton.language as tl

from mspt.kernels import reference
from mspt.kernels.triton.fused import fused
from mspt.kernels.triton.launch import launch

ATOMS = 32  # of a program of the 3 × 3 kernels: one a thread
SHARE = 16  # atoms whose part of the weight's gradient one program adds up


@triton.jit
def load_three(base, channel, inside, F: tl.constexpr):
    """Three rows [F] of an atom, in float64 (by way of float32: the interpreter knows no other way from bfloat16)."""
    x = tl.load(base + channel, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    y = tl.load(base + F + channel, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    z = tl.load(base + 2 * F + channel, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    return x, y, z


@triton.jit
def load_centred(vec, mean, atom, n, channel, inside, F: tl.constexpr):
    """V of an atom; mean [9, n]: of moments_kernel."""
    x, y, z = load_three(vec + atom * 3 * F, channel, inside, F)
    x = tl.where(inside, x - tl.load(mean + atom), 0.0)
    y = tl.where(inside, y - tl.load(mean + n + atom), 0.0)
    z = tl.where(inside, z - tl.load(mean + 2 * n + atom), 0.0)
    return x, y, z


@triton.jit
def moments_kernel(vec, moments, n, F: tl.constexpr, BLOCK: tl.constexpr):
    """vec [n, 3, F] -> moments [9, n]: the means of x, y, z, then V Vᵀ / F as xx, xy, xz, yy, yz, zz."""
    atom, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = channel < F
    x, y, z = load_three(vec + atom * 3 * F, channel, inside, F)
    mean_x, mean_y, mean_z = tl.sum(x, 0) / F, tl.sum(y, 0) / F, tl.sum(z, 0) / F
    x = tl.where(inside, x - mean_x, 0.0)
    y = tl.where(inside, y - mean_y, 0.0)
    z = tl.where(inside, z - mean_z, 0.0)
    moments += atom
    tl.store(moments, mean_x)
    tl.store(moments + n, mean_y)
    tl.store(moments + 2 * n, mean_z)
    tl.store(moments + 3 * n, tl.sum(x * x, 0) / F)
    tl.store(moments + 4 * n, tl.sum(x * y, 0) / F)
    tl.store(moments + 5 * n, tl.sum(x * z, 0) / F)
    tl.store(moments + 6 * n, tl.sum(y * y, 0) / F)
    tl.store(moments + 7 * n, tl.sum(y * z, 0) / F)
    tl.store(moments + 8 * n, tl.sum(z * z, 0) / F)


@triton.jit
def rotate(app, aqq, apq, apr, aqr, upx, upy, upz, uqx, uqy, uqz):
    """A Jacobi rotation of axes p and q (r is the third) that zeroes apq; u: the eigenvectors so far, by axis."""
    gap = aqq - app
    twice = 2.0 * apq
    size = tl.abs(gap) + tl.sqrt(gap * gap + twice * twice)
    tangent = tl.where(size > 0, tl.where(gap < 0, -twice, twice) / tl.where(size > 0, size, 1.0), 0.0)
    c = 1.0 / tl.sqrt(1.0 + tangent * tangent)
    s = tangent * c
    shift = tangent * apq
    return (
        app - shift, aqq + shift, c * apr - s * aqr, s * apr + c * aqr,
        c * upx - s * uqx, c * upy - s * uqy, c * upz - s * uqz,
        s * upx + c * uqx, s * upy + c * uqy, s * upz + c * uqz,
    )  # fmt: skip


@triton.jit
def roots_kernel(
    moments, eigen, n, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, LEAST: tl.constexpr, ATOMS: tl.constexpr
):
    """The eigen-decomposition of C = V Vᵀ / F + diag(R) by six Jacobi sweeps -> eigen [12, n]: the inverse roots of the
    three eigenvalues, then their vectors, each x, y, z.
    """
    atom = tl.program_id(0).to(tl.int64) * ATOMS + tl.arange(0, ATOMS)
    inside = atom < n
    moments += atom
    xx = tl.load(moments + 3 * n, mask=inside, other=1.0) + R0
    xy = tl.load(moments + 4 * n, mask=inside, other=0.0)
    xz = tl.load(moments + 5 * n, mask=inside, other=0.0)
    yy = tl.load(moments + 6 * n, mask=inside, other=1.0) + R1
    yz = tl.load(moments + 7 * n, mask=inside, other=0.0)
    zz = tl.load(moments + 8 * n, mask=inside, other=1.0) + R2
    zero, one = tl.zeros((ATOMS,), tl.float64), tl.full((ATOMS,), 1.0, tl.float64)
    ax, ay, az, bx, by, bz, cx, cy, cz = one, zero, zero, zero, one, zero, zero, zero, one
    for _ in tl.static_range(6):
        xx, yy, xz, yz, ax, ay, az, bx, by, bz = rotate(xx, yy, xy, xz, yz, ax, ay, az, bx, by, bz)
        # Each rotation leaves a zero, which the next one fills again.
        xx, zz, xy, yz, ax, ay, az, cx, cy, cz = rotate(xx, zz, xz, zero, yz, ax, ay, az, cx, cy, cz)
        yy, zz, xy, xz, bx, by, bz, cx, cy, cz = rotate(yy, zz, yz, xy, zero, bx, by, bz, cx, cy, cz)
        yz = zero
    # C is at least the smallest of R, LEAST: a smaller eigenvalue is rounding.
    eigen += atom
    tl.store(eigen, 1.0 / tl.sqrt(tl.maximum(xx, LEAST)), mask=inside)
    tl.store(eigen + n, 1.0 / tl.sqrt(tl.maximum(yy, LEAST)), mask=inside)
    tl.store(eigen + 2 * n, 1.0 / tl.sqrt(tl.maximum(zz, LEAST)), mask=inside)
    tl.store(eigen + 3 * n, ax, mask=inside)
    tl.store(eigen + 4 * n, ay, mask=inside)
    tl.store(eigen + 5 * n, az, mask=inside)
    tl.store(eigen + 6 * n, bx, mask=inside)
    tl.store(eigen + 7 * n, by, mask=inside)
    tl.store(eigen + 8 * n, bz, mask=inside)
    tl.store(eigen + 9 * n, cx, mask=inside)
    tl.store(eigen + 10 * n, cy, mask=inside)
    tl.store(eigen + 11 * n, cz, mask=inside)


@triton.jit
def load_eigen(eigen, n, inside):
    """The three inverse roots and the three eigenvectors; eigen: at an atom or several."""
    a = tl.load(eigen, mask=inside, other=1.0)
    b = tl.load(eigen + n, mask=inside, other=1.0)
    c = tl.load(eigen + 2 * n, mask=inside, other=1.0)
    ax = tl.load(eigen + 3 * n, mask=inside, other=0.0)
    ay = tl.load(eigen + 4 * n, mask=inside, other=0.0)
    az = tl.load(eigen + 5 * n, mask=inside, other=0.0)
    bx = tl.load(eigen + 6 * n, mask=inside, other=0.0)
    by = tl.load(eigen + 7 * n, mask=inside, other=0.0)
    bz = tl.load(eigen + 8 * n, mask=inside, other=0.0)
    cx = tl.load(eigen + 9 * n, mask=inside, other=0.0)
    cy = tl.load(eigen + 10 * n, mask=inside, other=0.0)
    cz = tl.load(eigen + 11 * n, mask=inside, other=0.0)
    return a, b, c, ax, ay, az, bx, by, bz, cx, cy, cz


@triton.jit
def transform(eigen, atom, n, x, y, z):
    """T times three rows."""
    a, b, c, ax, ay, az, bx, by, bz, cx, cy, cz = load_eigen(eigen + atom, n, True)
    p = a * (ax * x + ay * y + az * z)
    q = b * (bx * x + by * y + bz * z)
    r = c * (cx * x + cy * y + cz * z)
    return ax * p + bx * q + cx * r, ay * p + by * q + cy * r, az * p + bz * q + cz * r


@triton.jit
def store_three(base, channel, inside, x, y, z, F: tl.constexpr):
    tl.store(base + channel, x.to(tl.float32).to(base.dtype.element_ty), mask=inside)
    tl.store(base + F + channel, y.to(tl.float32).to(base.dtype.element_ty), mask=inside)
    tl.store(base + 2 * F + channel, z.to(tl.float32).to(base.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(vec, weight, moments, eigen, out, n, F: tl.constexpr, BLOCK: tl.constexpr):
    """T V weight -> out [n, 3, F]."""
    atom, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = channel < F
    x, y, z = load_centred(vec, moments, atom, n, channel, inside, F)
    x, y, z = transform(eigen, atom, n, x, y, z)
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    store_three(out + atom * 3 * F, channel, inside, x * w, y * w, z * w, F)


@triton.jit
def load_gradient(gradient, weight, atom, channel, inside, F: tl.constexpr):
    """The gradient of T V: that of the output times weight."""
    x, y, z = load_three(gradient + atom * 3 * F, channel, inside, F)
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    return x * w, y * w, z * w


@triton.jit
def gradient_moments_kernel(gradient, vec, weight, moments, sums, n, F: tl.constexpr, BLOCK: tl.constexpr):
    """sums [9, n]: the means of G, the gradient of T V, over channels, then the symmetric part of G Vᵀ in six."""
    atom, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = channel < F
    x, y, z = load_centred(vec, moments, atom, n, channel, inside, F)
    g_x, g_y, g_z = load_gradient(gradient, weight, atom, channel, inside, F)
    sums += atom
    tl.store(sums, tl.sum(g_x, 0) / F)
    tl.store(sums + n, tl.sum(g_y, 0) / F)
    tl.store(sums + 2 * n, tl.sum(g_z, 0) / F)
    tl.store(sums + 3 * n, tl.sum(g_x * x, 0))
    tl.store(sums + 4 * n, tl.sum(g_x * y + g_y * x, 0) / 2)
    tl.store(sums + 5 * n, tl.sum(g_x * z + g_z * x, 0) / 2)
    tl.store(sums + 6 * n, tl.sum(g_y * y, 0))
    tl.store(sums + 7 * n, tl.sum(g_y * z + g_z * y, 0) / 2)
    tl.store(sums + 8 * n, tl.sum(g_z * z, 0))


@triton.jit
def between(a, b):
    """The Loewner matrix of x^{-1/2} at eigenvalues whose inverse roots are a and b: no difference to divide by."""
    return -(a * a) * (b * b) / (a + b)


@triton.jit
def loewner_kernel(eigen, sums, g_covariance, n, ATOMS: tl.constexpr):
    """The gradient of C [6, n]: (symmetric part of G Vᵀ in C's eigenbasis) times the Loewner matrix, turned back."""
    atom = tl.program_id(0).to(tl.int64) * ATOMS + tl.arange(0, ATOMS)
    inside = atom < n
    sums += atom
    xx = tl.load(sums + 3 * n, mask=inside, other=0.0)
    xy = tl.load(sums + 4 * n, mask=inside, other=0.0)
    xz = tl.load(sums + 5 * n, mask=inside, other=0.0)
    yy = tl.load(sums + 6 * n, mask=inside, other=0.0)
    yz = tl.load(sums + 7 * n, mask=inside, other=0.0)
    zz = tl.load(sums + 8 * n, mask=inside, other=0.0)
    a, b, c, ax, ay, az, bx, by, bz, cx, cy, cz = load_eigen(eigen + atom, n, inside)
    # The matrix times each eigenvector, then its elements between them.
    px, py, pz = xx * ax + xy * ay + xz * az, xy * ax + yy * ay + yz * az, xz * ax + yz * ay + zz * az
    qx, qy, qz = xx * bx + xy * by + xz * bz, xy * bx + yy * by + yz * bz, xz * bx + yz * by + zz * bz
    rx, ry, rz = xx * cx + xy * cy + xz * cz, xy * cx + yy * cy + yz * cz, xz * cx + yz * cy + zz * cz
    aa = (ax * px + ay * py + az * pz) * between(a, a)
    ab = (bx * px + by * py + bz * pz) * between(a, b)
    ac = (cx * px + cy * py + cz * pz) * between(a, c)
    bb = (bx * qx + by * qy + bz * qz) * between(b, b)
    bc = (cx * qx + cy * qy + cz * qz) * between(b, c)
    cc = (cx * rx + cy * ry + cz * rz) * between(c, c)
    px, py, pz = aa * ax + ab * bx + ac * cx, aa * ay + ab * by + ac * cy, aa * az + ab * bz + ac * cz
    qx, qy, qz = ab * ax + bb * bx + bc * cx, ab * ay + bb * by + bc * cy, ab * az + bb * bz + bc * cz
    rx, ry, rz = ac * ax + bc * bx + cc * cx, ac * ay + bc * by + cc * cy, ac * az + bc * bz + cc * cz
    g_covariance += atom
    tl.store(g_covariance, ax * px + bx * qx + cx * rx, mask=inside)
    tl.store(g_covariance + n, ax * py + bx * qy + cx * ry, mask=inside)
    tl.store(g_covariance + 2 * n, ax * pz + bx * qz + cx * rz, mask=inside)
    tl.store(g_covariance + 3 * n, ay * py + by * qy + cy * ry, mask=inside)
    tl.store(g_covariance + 4 * n, ay * pz + by * qz + cy * rz, mask=inside)
    tl.store(g_covariance + 5 * n, az * pz + bz * qz + cz * rz, mask=inside)


@triton.jit
def product_backward_kernel(
    gradient, vec, weight, moments, eigen, sums, g_covariance, g_vec, g_weight, n,
    F: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Gradients of vec, T (G − its mean) + 2 / F (gradient of C) V, and of weight, a program's part [programs, F]."""
    channel = tl.arange(0, BLOCK)
    inside = channel < F
    total = tl.zeros((BLOCK,), tl.float64)
    atom = tl.program_id(0).to(tl.int64) * SHARE
    end = tl.minimum(atom + SHARE, n)
    while atom < end:
        x, y, z = load_centred(vec, moments, atom, n, channel, inside, F)
        g_x, g_y, g_z = load_three(gradient + atom * 3 * F, channel, inside, F)
        t_x, t_y, t_z = transform(eigen, atom, n, x, y, z)
        total += g_x * t_x + g_y * t_y + g_z * t_z
        w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
        g_x = g_x * w - tl.load(sums + atom)
        g_y = g_y * w - tl.load(sums + n + atom)
        g_z = g_z * w - tl.load(sums + 2 * n + atom)
        g_x, g_y, g_z = transform(eigen, atom, n, g_x, g_y, g_z)
        at = g_covariance + atom
        xx, xy, xz = tl.load(at), tl.load(at + n), tl.load(at + 2 * n)
        yy, yz, zz = tl.load(at + 3 * n), tl.load(at + 4 * n), tl.load(at + 5 * n)
        g_x += (xx * x + xy * y + xz * z) * (2.0 / F)
        g_y += (xy * x + yy * y + yz * z) * (2.0 / F)
        g_z += (xz * x + yz * y + zz * z) * (2.0 / F)
        store_three(g_vec + atom * 3 * F, channel, inside, g_x, g_y, g_z, F)
        atom += 1
    tl.store(g_weight + tl.program_id(0) * F + channel, total.to(tl.float32), mask=inside)


def _block(channels):
    """Channels of a program, and its warps: four float64 values of each row a thread."""
    block = triton.next_power_of_2(channels)
    return {"F": channels, "BLOCK": block, "warps": min(max(block // 128, 1), 8)}


def _forward(vec, weight, regular):
    n, _, channels = vec.shape
    moments = vec.new_empty(9, n, dtype=torch.float64)
    eigen = vec.new_empty(12, n, dtype=torch.float64)
    out, shape = torch.empty_like(vec), _block(channels)
    launch(moments_kernel, (n,), vec, moments, n, **shape)
    added = dict(zip(("R0", "R1", "R2"), regular, strict=True))
    grid = (triton.cdiv(n, ATOMS),)
    launch(roots_kernel, grid, moments, eigen, n, **added, LEAST=min(regular), ATOMS=ATOMS)
    launch(product_kernel, (n,), vec, weight, moments, eigen, out, n, **shape)
    return out, (moments, eigen)


def _backward(gradients, tensors, kept, _regular):
    (gradient,), (vec, weight), (moments, eigen) = gradients, tensors, kept
    n, _, channels = vec.shape
    sums, g_covariance = torch.empty_like(moments), moments.new_empty(6, n)
    programs, shape = triton.cdiv(n, SHARE), _block(channels)
    g_vec, g_weight = torch.empty_like(vec), vec.new_empty(programs, channels, dtype=torch.float32)
    launch(gradient_moments_kernel, (n,), gradient, vec, weight, moments, sums, n, **shape)
    launch(loewner_kernel, (triton.cdiv(n, ATOMS),), eigen, sums, g_covariance, n, ATOMS=ATOMS)
    launch(
        product_backward_kernel,
        (programs,),
        *(gradient, vec, weight, moments, eigen, sums, g_covariance, g_vec, g_weight, n),
        SHARE=SHARE,
        **shape,
    )
    return g_vec, g_weight.sum(0).to(weight.dtype)


_whiten = fused(_forward, _backward, reference.whiten)


def whiten(vec, weight, regular):
    """reference.whiten."""
    return _whiten((vec, weight), regular)
