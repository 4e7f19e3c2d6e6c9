"""What a count of right answers says: Wilson's interval and unbiased pass@k."""

from __future__ import annotations

import math


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (E. B. Wilson, 1927); (0, 1) where nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    p, n = right / total, float(total)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at(k: int, right: int, total: int) -> float:
    """The chance that k of `total` answers drawn without replacement hold a right one (arXiv 2107.03374)."""
    if total - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(total - right + 1, total + 1))
