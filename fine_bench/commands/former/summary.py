"""``python -m fine_bench.summary``: today ``fine-bench summary``. Kept for one release."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["summary"]
    runpy.run_module("fine_bench", run_name="__main__")
