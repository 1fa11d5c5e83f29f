"""The two-dimensional DCT-II of chunks and its inverse in NumPy, which ``_native`` equals bit for bit.

One length n at a time, without the factors that make it orthonormal: X[u] = sum of x[i] * cos(pi * (2i + 1) * u / 2n).
An even length is two transforms of half of it (B. G. Lee, IEEE Trans. ASSP 32(6), 1984); an odd one is a sum over the
table of cosines. Every product, sum and difference is rounded to float32, in the order written here.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorwire.kernels.tables import DCT_MOST

Array = npt.NDArray[Any]

_COSINES: Final = DCT_MOST * (DCT_MOST + 1) * (2 * DCT_MOST + 1) // 6
_ROWS, _COLUMNS = -2, -1


def forward(chunks: Array, tables: Array) -> Array:
    """The coefficients of chunks, arrays whose last two dimensions are rows and columns."""
    turned = _forward(np.moveaxis(chunks, _ROWS, 0), tables)
    made = np.moveaxis(_forward(np.moveaxis(turned, _COLUMNS, 0), tables), 0, -1)
    return np.moveaxis(made, 0, _ROWS) * _factors(*chunks.shape[_ROWS:])


def inverse(coefficients: Array, tables: Array) -> Array:
    """The elements of chunks: along the rows as a sum over ascending columns, then along the columns."""
    height, width = coefficients.shape[_ROWS:]
    scaled, cosines = coefficients * _factors(height, width), _cosines(tables, width)
    rows = np.zeros_like(scaled)
    for v in range(width):
        rows += scaled[..., v, None] * cosines[v]
    return np.moveaxis(_inverse(np.moveaxis(rows, _ROWS, 0), tables), 0, _ROWS)


def _factors(height: int, width: int) -> Array:
    """By row and column: rounded from float64, so that the two-dimensional transform is orthonormal."""
    down, across = (np.minimum(np.arange(size), 1) + 1 for size in (height, width))
    factors: Array = np.sqrt(down[:, None] * across / (height * width)).astype(np.float32)
    return factors


def _cosines(tables: Array, n: int) -> Array:
    """Row u has those of frequency u."""
    at = (n - 1) * n * (2 * n - 1) // 6
    return tables[at : at + n * n].reshape(n, n)


def _secants(tables: Array, n: int, like: Array) -> Array:
    """1 / (2 * cos(pi * (2i + 1) / 2n)), shaped to multiply the first dimension."""
    half = n // 2
    at = _COSINES + half * (half - 1) // 2
    return tables[at : at + half].reshape(half, *[1] * (like.ndim - 1))


def _forward(x: Array, tables: Array) -> Array:
    """Along the first dimension."""
    n = x.shape[0]
    if n == 1:
        return x
    if n % 2:
        return _weighted(_cosines(tables, n), x)
    front, back = x[: n // 2], x[::-1][: n // 2]
    even = _forward(front + back, tables)
    odd = _forward((front - back) * _secants(tables, n, x), tables)
    made = np.empty_like(x)
    made[::2], made[1::2] = even, odd
    made[1:-1:2] += odd[1:]
    return made


def _inverse(x: Array, tables: Array) -> Array:
    """Along the first dimension."""
    n = x.shape[0]
    if n == 1:
        return x
    if n % 2:
        return _weighted(_cosines(tables, n).T, x)
    odd = x[1::2].copy()
    odd[1:] += x[1:-1:2]
    even, odd = _inverse(x[::2], tables), _inverse(odd, tables) * _secants(tables, n, x)
    return np.concatenate([even + odd, (even - odd)[::-1]])


def _weighted(weights: Array, x: Array) -> Array:
    """Each number is the sum of weights[number, i] * x[i], over ascending i, beginning at +0."""
    made = np.zeros_like(x)
    for i, weight in enumerate(weights.T):
        made += weight.reshape(-1, *[1] * (x.ndim - 1)) * x[i]
    return made
