"""``python -m fine_bench.truth``: today ``fine-bench truth``. Kept for one release."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["truth"]
    runpy.run_module("fine_bench", run_name="__main__")
