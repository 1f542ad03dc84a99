"""Training under Lightning without a word."""

from __future__ import annotations

from typing import Any

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Options of a ``Trainer``: on the CPU, nothing is printed, nothing written."""
