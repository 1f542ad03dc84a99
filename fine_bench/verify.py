"""``python -m fine_bench.verify``: recompute a record, and say whether it comes out equal."""

from __future__ import annotations

from fine_bench.run.verify import main

if __name__ == "__main__":
    raise SystemExit(main())
