"""``python -m fine_bench.clean``: find wrong labels in your own data, at an error rate."""

from __future__ import annotations

from fine_bench.run.clean import main

if __name__ == "__main__":
    raise SystemExit(main())
