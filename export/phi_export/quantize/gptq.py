"""GPTQ: round one column after the other and let the following columns make up for each error.

A matrix W [R, C] multiplies activations x [C] of second moment H = E[x x^T], so that an error D costs
tr(D H D^T). Columns are rounded one after the other, the most used first; the error of each is spread over
those that follow so that the cost grows least (GPTQ, arXiv:2210.17323), under steps that are chosen before:
D_later -= error_j V_j,later, where H^-1 = V^T diag(.) V and V is upper triangular with ones on its diagonal.

The columns of a wide matrix are dealt to several groups, and H is taken to be zero between them: time grows with the
cube of a group's width, and a text of some ten thousand tokens says little of more directions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi_runtime.architecture.decoder import F32

# Takes a column's number and its values over rows [R]; gives their codes and the values that these stand for.
Level = Callable[[int, F32], tuple[np.ndarray, F32]]

# Of the mean of H's diagonal: what calibration did not see is not worthless. On a fully trained model, 0.3 left less
# than 0.05 and 1 did, on text like the calibration's and on other text.
DAMPING = 0.3
_LEAF = 16  # columns rounded one by one before their errors go further
_SMALL = 192  # rows below which LAPACK factorises faster than products of blocks do


WIDEST = 4096  # columns of a group


def groups(columns: int) -> int:
    """How many groups a matrix's columns are dealt to: column c goes to group c modulo that."""
    return next(g for g in range(-(-columns // WIDEST), columns + 1) if columns % g == 0)


@dataclass(frozen=True)
class HessianFactor:
    """What feedback needs to know of a matrix's inputs: the order of its columns [C], group by group; V of each group
    in that order [C / G, C / G]; and what an error of each column costs that the later ones do not make up for, [C],
    as the matrix has its columns.
    """

    order: npt.NDArray[np.int64]
    unit_upper: tuple[F32, ...]
    importance: F32

    def places(self) -> Iterator[tuple[slice, F32]]:
        """Where each group stands in the order, and its V."""
        width = len(self.order) // len(self.unit_upper)
        for n, unit_upper in enumerate(self.unit_upper):
            yield slice(n * width, (n + 1) * width), unit_upper

    def unscaled(self, columns: F32) -> "HessianFactor":
        """Of the inputs as they are, where these are of inputs divided by `columns`; damped anew."""
        diagonal: F32 = (1 / np.sqrt(self.importance[self.order])).astype(np.float32)
        count, hessians = len(self.unit_upper), []
        for n, (place, unit_upper) in enumerate(self.places()):
            upper = _inverse_of_upper(unit_upper * diagonal[place, None])
            hessian = np.empty_like(upper)
            own = self.order[place] // count
            hessian[np.ix_(own, own)] = upper @ upper.T
            scale = columns[n::count]
            hessians.append(hessian * scale[:, None] * scale)
        return factorise(*hessians)


def factorise(*hessians: F32) -> HessianFactor:
    """The factor of a Hessian [C, C], or of those of its groups."""
    count = len(hessians)
    mean = np.mean([np.diag(m).mean(dtype=np.float64) for m in hessians])
    damping = np.float32(DAMPING * mean or 1.0)
    orders, unit_uppers = [], []
    importance = np.empty(count * len(hessians[0]), np.float32)
    for n, hessian in enumerate(hessians):
        order = np.argsort(-np.diag(hessian), kind="stable")
        backwards = order[::-1]  # the inverse's upper factor is the inverse of the factor from the far end
        damped = hessian[np.ix_(backwards, backwards)]
        damped[np.diag_indices_from(damped)] += damping
        upper = _inverse_of_lower_factor(damped)[::-1, ::-1]
        diagonal = np.diag(upper)
        importance[order * count + n] = 1 / np.square(diagonal)
        orders.append(order * count + n)
        unit_uppers.append(np.ascontiguousarray(upper / diagonal[:, None]))
    return HessianFactor(np.concatenate(orders), tuple(unit_uppers), importance)


def _inverse_of_lower_factor(a: F32) -> F32:
    """L^-1 of a = L L^T, by blocks, so that nearly all of it are matrix products."""
    n = len(a)
    if n <= _SMALL:
        return np.tril(np.linalg.inv(np.linalg.cholesky(a.astype(np.float64)))).astype(np.float32)
    h = n // 2
    out = np.zeros_like(a)
    out[:h, :h] = first = _inverse_of_lower_factor(a[:h, :h])
    below = a[h:, :h] @ first.T
    out[h:, h:] = second = _inverse_of_lower_factor(a[h:, h:] - below @ below.T)
    out[h:, :h] = second @ (below @ -first)
    return out


def _inverse_of_upper(a: F32) -> F32:
    """Of an upper triangular matrix, by blocks."""
    n = len(a)
    if n <= _SMALL:
        return np.triu(np.linalg.inv(a.astype(np.float64))).astype(np.float32)
    h = n // 2
    out = np.zeros_like(a)
    out[:h, :h], out[h:, h:] = _inverse_of_upper(a[:h, :h]), _inverse_of_upper(a[h:, h:])
    out[:h, h:] = out[:h, :h] @ a[:h, h:] @ -out[h:, h:]
    return out


def uniform(step: F32, sub: int, bits: int, zero: int | F32, offset: F32 | None = None) -> Level:
    """The grid step * (code - zero) - offset; step, offset and zero, where it is not one for all, [R, C / sub]."""
    steps = np.ascontiguousarray(step.T)
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=np.abs(steps) > 1e-30)
    offsets = None if offset is None else np.ascontiguousarray(offset.T)
    zeros = np.broadcast_to(np.float32(zero), step.shape).T
    highest = (1 << bits) - 1

    def level(column: int, w: F32) -> tuple[np.ndarray, F32]:
        block = column // sub
        code = w * inverse[block] if offsets is None else (w + offsets[block]) * inverse[block]
        np.rint(code, out=code)
        code += zeros[block]
        np.clip(code, 0, highest, out=code)
        value = (code - zeros[block]) * steps[block]
        return code, value if offsets is None else value - offsets[block]

    return level


def codebook(step: F32, sub: int, table: F32) -> Level:
    """The grid step * table[code], the table rising; step [R, C / sub], of either sign."""
    steps = np.ascontiguousarray(step.T)
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=np.abs(steps) > 1e-30)
    halfway = (table[1:] + table[:-1]) / 2

    def level(column: int, w: F32) -> tuple[np.ndarray, F32]:
        block = column // sub
        code = np.searchsorted(halfway, w * inverse[block])
        return code, table[code] * steps[block]

    return level


def palette(tables: F32, group: int) -> Level:
    """The nearest entry of the rising tables [R / group, size]."""
    halfway = ((tables[:, 1:] + tables[:, :-1]) / 2)[:, None]
    first = np.arange(len(tables))[:, None] * tables.shape[1]

    def level(column: int, w: F32) -> tuple[np.ndarray, F32]:
        code = (w.reshape(len(tables), group, 1) > halfway).sum(axis=2)
        return code.reshape(-1), tables.reshape(-1)[(first + code).reshape(-1)]

    return level


def values_at_rounding(x: F32, factor: HessianFactor, level: Level) -> F32:
    """What x [R, C] has become by the time that each column is rounded: the values that steps have to reach."""
    seen = np.empty_like(x)

    def watched(column: int, w: F32) -> tuple[np.ndarray, F32]:
        seen[:, column] = w
        return level(column, w)

    round_columns(x, factor, watched)
    return seen


def round_columns(x: F32, factor: HessianFactor, level: Level) -> npt.NDArray[np.uint8]:
    """Codes [R, C] of x [R, C]."""
    order = factor.order.tolist()
    w = np.ascontiguousarray(x.T[factor.order])  # a column's values lie together
    codes = np.empty(w.shape, np.uint8)

    def run(start: int, stop: int) -> None:
        """Round these columns of a group; afterwards w holds their errors."""
        if stop - start > _LEAF:
            middle = start + max(1, (stop - start) // (2 * _LEAF)) * _LEAF
            run(start, middle)
            w[first + middle : first + stop] -= (
                unit_upper[start:middle, middle:stop].T @ w[first + start : first + middle]
            )
            run(middle, stop)
            return
        for j in range(start, stop):
            column = order[first + j]
            codes[column], value = level(column, w[first + j])
            w[first + j] -= value
            if j + 1 < stop:
                w[first + j + 1 : first + stop] -= unit_upper[j, j + 1 : stop, None] * w[first + j]

    for place, unit_upper in factor.places():
        first = place.start
        run(0, len(unit_upper))
    return np.ascontiguousarray(codes.T)
