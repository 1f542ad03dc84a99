"""``python -m fine_bench.score``: today ``fine-bench score``. Kept for one release."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["score"]
    runpy.run_module("fine_bench", run_name="__main__")
