"""3x3 convolutions of spikes with fewer multiplications: Winograd's F(2x2, 3x3) (arXiv 1509.09308), exact in float32.

Two by two outputs come from four by four inputs d as Y = A^T [(G g G^T) * (B^T d B)] A, with 16 multiplications in place of 36.
B and A hold 0 and +-1, G halves: with integer weights g, everything is a multiple of 1/4, and exact in float32, in any order of
summation, while four times every partial sum stays below 2^24. `bound` proves that from the weights.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3nn_deploy.intnet import Conv2d

TWICE_G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]])

PEAK = np.full((4, 4), 2)
"""The largest magnitude of each element of B^T d B for spikes d: two spikes added and two subtracted, or four added."""
PEAK[1, 1] = 4

NARROW = 24
"""Channels on either side below which the sums cost more than the multiplications (measured at 16 and 32)."""


def weights(conv: Conv2d) -> NDArray[np.int64]:
    """4 G g G^T of each kernel, [4, 4, C, outputs]."""
    return np.einsum("iy,ocyx,jx->ijco", TWICE_G, conv.weight.astype(np.int64), TWICE_G)


def bound(quadruple: NDArray[np.int64]) -> int:
    """No partial sum has a larger magnitude, times four: every product of an output added up by its magnitude."""
    sums: NDArray[np.int64] = (np.abs(quadruple).sum(2) * PEAK[:, :, None]).sum((0, 1))
    return int(sums.max())


def pays(conv: Conv2d, grid: tuple[int, ...]) -> bool:
    """Whether `conv` is of the kind, onto (H, W) outputs, and wide enough for the sums to cost less (measured)."""
    rows, columns = tiles(grid)
    plain = conv.weight.shape[2:] == (3, 3) and conv.stride == conv.dilation == (1, 1) and conv.groups == 1
    covered = 4 * rows * columns <= 1.5 * grid[0] * grid[1]
    return plain and covered and min(conv.weight.shape[:2]) >= NARROW


def tiles(grid: tuple[int, ...]) -> tuple[int, int]:
    """How many 2x2 tiles cover (H, W) outputs."""
    return -(-grid[0] // 2), -(-grid[1] // 2)


def by_parity(source: NDArray[Any], padding: tuple[int, int], grid: tuple[int, ...]) -> NDArray[np.int8]:
    """The zero-padded spikes [N, H, W, C] with even columns and odd columns apart: [N, 2 rows + 2, 2, columns + 1, C], for
    the tiles of (H, W) outputs."""
    (n, height, _, channels), (rows, columns), (ph, pw) = source.shape, tiles(grid), padding
    padded = np.zeros((n, 2 * rows + 2, 2, columns + 1, channels), dtype=np.int8)
    for parity in range(2):
        first = (parity - pw) % 2
        some, at = source[:, :, first::2], (first + pw) // 2
        padded[:, ph : ph + height, parity, at : at + some.shape[2]] = some
    return padded


def drive(spikes: NDArray[np.int8], weight: NDArray[np.float32], room: NDArray[np.float32], out: NDArray[Any]) -> None:
    """Put the sums of some rows of tiles into `out` [N, H, W, outputs]; `spikes` as from `by_parity`, rows alike.

    Args:
        weight: [16, C, outputs], a quarter of `weights`.
        room: for 16 * tiles * (C + outputs) values.
    """
    n, rows, _, columns, channels = spikes.shape
    shape = (n, rows // 2 - 1, columns - 1)
    count, outputs = shape[0] * shape[1] * shape[2], weight.shape[2]
    seen = room[: 16 * count * channels].reshape(4, 4, *shape, channels)
    d0, d1, d2, d3 = (spikes[:, i : rows - 2 + i : 2] for i in range(4))
    for one, (a, b, combine) in zip(
        seen, ((d0, d2, np.subtract), (d1, d2, np.add), (d2, d1, np.subtract), (d1, d3, np.subtract)), strict=True
    ):
        row = combine(a, b).astype(np.float32)
        even, odd = row[:, :, 0], row[:, :, 1]
        e0, e1, o0, o1 = even[:, :, :-1], even[:, :, 1:], odd[:, :, :-1], odd[:, :, 1:]
        np.subtract(e0, e1, out=one[0])
        np.add(o0, e1, out=one[1])
        np.subtract(e1, o0, out=one[2])
        np.subtract(o0, o1, out=one[3])
    products = room[16 * count * channels :][: 16 * count * outputs]
    np.matmul(seen.reshape(16, count, channels), weight, out=products.reshape(16, count, outputs))
    m0, m1, m2, m3 = products.reshape(4, 4, *shape, outputs)
    m0 += m1
    m0 += m2
    m1 -= m2
    m1 -= m3
    for top, (y0, y1, y2, y3) in enumerate((m0, m1)):
        y0 += y1
        y1 -= y2
        for left, (a, b, combine) in enumerate(((y0, y2, np.add), (y1, y3, np.subtract))):
            place = out[:, top::2, left::2]
            some = np.s_[:, : place.shape[1], : place.shape[2]]
            combine(a[some], b[some], out=place)
