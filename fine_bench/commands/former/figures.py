"""``python -m fine_bench.figures``: today ``fine-bench figures``. Kept for one release."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["figures"]
    runpy.run_module("fine_bench", run_name="__main__")
