"""What a person is shown of an example: an image, a text, or the cells of a table's row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PNG = b"\x89PNG\r\n\x1a\n"
"""The eight bytes with which every PNG file begins."""


@dataclass(frozen=True)
class ImageView:
    """An image.

    Attributes:
        png: a PNG file.

    Raises:
        ValueError: other bytes.
    """

    png: bytes

    def __post_init__(self) -> None:
        """Refuse what no browser would show."""
        if not self.png.startswith(PNG):
            raise ValueError(
                f"png must be the bytes of a PNG file, got {len(self.png)} bytes that begin with "
                f"{self.png[:8]!r}; write the image with PIL.Image.save(file, 'PNG')"
            )


@dataclass(frozen=True)
class TextView:
    """A text, as it is: line breaks count, and nothing in it is markup."""

    text: str


@dataclass(frozen=True)
class RowView:
    """A row of a table.

    Attributes:
        cells: column → value, in the order in which they are shown.
    """

    cells: Mapping[str, object]


View = ImageView | TextView | RowView
"""One of the three."""
