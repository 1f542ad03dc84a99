"""``python -m fine_bench.bank``: today ``fine-bench bank``. Kept for one release."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["bank"]
    runpy.run_module("fine_bench", run_name="__main__")
