"""``python -m fine_bench.cure``: remove, relabel or weight down, and train again."""

from __future__ import annotations

from fine_bench.run.cure import main

if __name__ == "__main__":
    raise SystemExit(main())
