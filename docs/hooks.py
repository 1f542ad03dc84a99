"""MkDocs hook: published figures are shown where they lie, in results/images, without a copy."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

IMAGES = Path(__file__).parents[1] / "results" / "images"
SHOWN = (
    "retraining_curves--digits_400.png",
    "figure3_equal_means.png",
    "fidelity.png",
    "this_run.png",
    "runs_at_equal_compute--mnist_mlp.png",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the figures that the pages show as figures/NAME."""
    for name in SHOWN:
        files.append(File.generated(config, f"figures/{name}", abs_src_path=str(IMAGES / name)))
    return files
