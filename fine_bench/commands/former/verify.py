"""``python -m fine_bench.verify``: today ``fine-bench verify``. Kept for one release."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["verify"]
    runpy.run_module("fine_bench", run_name="__main__")
