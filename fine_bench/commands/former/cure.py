"""``python -m fine_bench.cure``: today ``fine-bench cure``. Kept for one release."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["cure"]
    runpy.run_module("fine_bench", run_name="__main__")
