"""``python -m fine_bench.clean``: today ``fine-bench clean``. Kept for one release."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["clean"]
    runpy.run_module("fine_bench", run_name="__main__")
