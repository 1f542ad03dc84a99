"""``python -m fine_bench.leaderboard``: today ``fine-bench leaderboard``. Kept for one release."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["leaderboard"]
    runpy.run_module("fine_bench", run_name="__main__")
