"""``python -m fine_bench.sensitivity``: today ``fine-bench sensitivity``. Kept for one release."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["sensitivity"]
    runpy.run_module("fine_bench", run_name="__main__")
