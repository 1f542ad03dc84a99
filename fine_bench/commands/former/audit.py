"""``python -m fine_bench.audit``: today ``fine-bench audit``. Kept for one release."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["audit"]
    runpy.run_module("fine_bench", run_name="__main__")
