"""`rorqual plan` beside the GPU hours that DeepSeek published, and beside our own runs on this machine."""

from __future__ import annotations

import sys

from record import Row, read_record, write_record

from rorqual.model.published import published
from rorqual.plan.device import device
from rorqual.plan.estimate import fit

PUBLISHED = (
    ("DeepSeek 67B, 1e12 tokens (calibrated on)", published("deepseek-67b"), 1e12, False, 300.6e3),
    ("DeepSeek-V2, 1e12 tokens (calibrated on)", published("deepseek-v2"), 1e12, False, 172.8e3),
    ("DeepSeek-V3, 14.8e12 tokens", published("deepseek-v3"), 14.8e12, True, 2.664e6),
)


def main() -> int:
    """Compare, print, record."""
    rows = []
    for name, config, tokens, fp8, hours in PUBLISHED:
        found = fit(config, 2048, tokens, device("h800"), fp8=fp8).gpu_hours
        ratio = min(found, hours) / max(found, hours)
        goal = 0.8 if "calibrated" not in name else None
        rows.append(Row(f"plan, H800 hours of {name}", found, hours, "published", ratio, goal, "hours"))
    trained = {r["what"]: r for r in read_record("train_throughput")["rows"]}
    both = trained["training, experts against our dense model of equal active FLOPs"]
    # Equal FLOPs and products of few experts on a processor: the model says equal speed.
    ratio = min(both["ours"], both["peer"]) / max(both["ours"], both["peer"])
    rows.append(
        Row("plan, our experts' training speed from our dense one's", both["peer"], both["ours"], "measured", ratio,
            0.8, "tokens/s")
    )  # fmt: skip
    for row in rows:
        print(row)
    print(write_record("parallel_plan", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
