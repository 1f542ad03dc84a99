"""``python -m fine_bench.bank``: train the models of a bank, or those that it lacks."""

from __future__ import annotations

from fine_bench.run.bank import main

if __name__ == "__main__":
    main()
