"""``python -m fine_bench.report``: today ``fine-bench report``. Kept for one release."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["report"]
    runpy.run_module("fine_bench", run_name="__main__")
