"""From a plan of about the wanted size to one whose real file meets it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from clipq.hold import SHORTFALL
from clipq.search.allocate import fitted, scaled, smallest
from clipq.search.groups import Theta
from clipq.search.sizes import SizeModel, pruning_rate_of

Thetas = tuple[Theta, ...]
FileBytes = Callable[[Thetas], int]
"""The bytes of the file of a plan: a real encode."""

_TRIES = 8
_GROWTHS = 300
"""Encodes spent on single groups; small nets, which alone need it, are done sooner."""
_TINY = 4096
"""Bytes of files in which small tensors, which are stored together, matter: there the size model is not enough."""


def fit(sizes: Sequence[SizeModel], thetas: Sequence[Theta], target: int, file_bytes: FileBytes) -> tuple[Thetas, int]:
    """The plan with its survivors scaled such that its real file meets the target, and the file's bytes.

    If that is not enough, groups get fewer bits; then the smallest plan is taken. The file is never above the target
    if that of `smallest_file` is not. It is at most `SHORTFALL` below, unless no one group can be given another bit, or
    1, 2, 4, … weights more, so that the file grows without exceeding the target.
    """
    found = _scaled(sizes, thetas, target, file_bytes)
    if found is None:
        found = _with_fewer_bits(sizes, thetas, target, file_bytes) or smallest_file(sizes, file_bytes)
    return _grown(sizes, *found, target, file_bytes)


def smallest_file(sizes: Sequence[SizeModel], file_bytes: FileBytes) -> tuple[Thetas, int]:
    """The smallest file that a search can reach, and its plan."""
    plan = smallest(sizes)
    least = file_bytes(plan)
    if least > _TINY:
        return plan, least
    for i, size in enumerate(sizes):
        for bits in size.bits:
            for sparsity in (0.0, size.highest):
                other = (*plan[:i], Theta(pruning_rate_of(sparsity), bits), *plan[i + 1 :])
                if (found := file_bytes(other)) < least:
                    plan, least = other, found
    return plan, least


def _scaled(
    sizes: Sequence[SizeModel], thetas: Sequence[Theta], target: int, file_bytes: FileBytes
) -> tuple[Thetas, int] | None:
    """The largest found that meets the target; None if none does."""
    best: tuple[Thetas, int] | None = None
    candidate, found = tuple(thetas), file_bytes(tuple(thetas))
    for _ in range(_TRIES):
        rest = found - _bytes(sizes, candidate)
        candidate = fitted(sizes, thetas, (1 - SHORTFALL / 4) * target - rest)
        found = file_bytes(candidate)
        if found <= target and (best is None or found > best[1]):
            best = candidate, found
        if (1 - SHORTFALL / 2) * target <= found <= target:
            break
    return best


def _with_fewer_bits(
    sizes: Sequence[SizeModel], thetas: Sequence[Theta], target: int, file_bytes: FileBytes
) -> tuple[Thetas, int] | None:
    """As thin as it goes and with as many bits as then meet the target, those of the most bits lowered first."""
    thin = scaled(sizes, thetas, 0.0)
    while (found := file_bytes(thin)) > target:
        excess = float(found - target)
        while excess > 0:
            can = [i for i, (size, t) in enumerate(zip(sizes, thin, strict=True)) if t.bits > size.bits[0]]
            if not can:
                return None
            i = max(can, key=lambda i: (thin[i].bits, sizes[i].group.size))
            less = Theta(thin[i].pruning_rate, thin[i].bits - 1)
            excess -= max(sizes[i].bytes(thin[i]) - sizes[i].bytes(less), 1)
            thin = (*thin[:i], less, *thin[i + 1 :])
    return thin, found


def _grown(
    sizes: Sequence[SizeModel], thetas: Thetas, found: int, target: int, file_bytes: FileBytes
) -> tuple[Thetas, int]:
    left = _GROWTHS
    while found < (1 - SHORTFALL) * target:
        best = thetas, found
        for larger in larger_plans(sizes, thetas):
            if (left := left - 1) < 0:
                return best
            size = file_bytes(larger)
            if best[1] < size <= target:
                best = larger, size
        if best[1] == found:
            break
        thetas, found = best
    return thetas, found


def larger_plans(sizes: Sequence[SizeModel], thetas: Thetas) -> Iterator[Thetas]:
    """One group with 1, 2, 4, … weights more, or with another bit."""
    for i, (size, theta) in enumerate(zip(sizes, thetas, strict=True)):
        pruned, more, larger = theta.pruning_rate * size.group.size, 1, []
        while pruned > 1e-6 and more < 2 * pruned:
            larger.append(Theta(max(pruned - more, 0.0) / size.group.size, theta.bits))
            more *= 2
        if theta.bits < size.bits[-1]:
            larger.append(Theta(theta.pruning_rate, theta.bits + 1))
        yield from ((*thetas[:i], changed, *thetas[i + 1 :]) for changed in larger)


def _bytes(sizes: Sequence[SizeModel], thetas: Sequence[Theta]) -> float:
    return sum(size.bytes(theta) for size, theta in zip(sizes, thetas, strict=True))
