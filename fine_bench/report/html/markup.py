"""Small pieces of HTML. Everything that comes from a record goes through ``text`` or ``tag``."""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from fine_bench.terminal import visible_lines

BASE = Path(__file__).parent / "base.css"
"""Colours and letters of every page."""


class Safe(str):
    """Markup that was made here, and is not escaped again."""

    __slots__ = ()


def text(value: object) -> Safe:
    """``value`` as text: ``& < > " '`` escaped, control characters shown; ``Safe`` stays."""
    return value if isinstance(value, Safe) else Safe(html.escape(visible_lines(value), quote=True))


def join(parts: Iterable[object], between: str = "") -> Safe:
    """Pieces one after the other, each escaped unless safe."""
    return Safe(between.join(text(part) for part in parts))


def tag(name: str, /, *content: object, **attributes: object) -> Safe:
    """``<name …>content</name>``; a trailing ``_`` of an attribute falls, other ``_`` become ``-``.

    An attribute that is None or False is left out, True stands without a value.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    return Safe(f"<{name}{written}>{join(content)}</{name}>")


def void(name: str, /, **attributes: object) -> Safe:
    """``<name …>``, an element that has no content."""
    return Safe(f"<{name}{''.join(_attribute(k, v) for k, v in attributes.items())}>")


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{text(value)}"'


def data_uri(kind: str, content: bytes) -> Safe:
    """An image inside the page; ``kind`` is its media type."""
    return Safe(f"data:{kind};base64,{base64.b64encode(content).decode()}")


def slug(words: str) -> str:
    """A fragment identifier: letters, digits and hyphens."""
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in words.lower())
    return "-".join(part for part in kept.split("-") if part) or "x"


def number(value: float, digits: int = 3) -> str:
    """Fixed decimals with a true minus and no minus before a zero; "–" where undefined."""
    if not math.isfinite(value):
        return "–"
    rounded = round(value, digits) + 0.0
    return f"{rounded:.{digits}f}".replace("-", "−")


def p_value(value: float) -> str:
    """A p-value: two significant digits, and a bound where it is very small."""
    if not math.isfinite(value):
        return "–"
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def document(
    *,
    title: str,
    style: str,
    script: str,
    body: Safe,
    blocks: Mapping[str, str] = MappingProxyType({}),
) -> bytes:
    """A whole page that asks for nothing: its policy allows its own style and script alone.

    Args:
        title: of the window.
        style: after the colours and letters of every page.
        script: run when the body is there.
        body: the content.
        blocks: JSON by the id of its element, without a ``<``, for the script.
    """
    style = BASE.read_text(encoding="utf-8") + style
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        void("meta", charset="utf-8"),
        void("meta", http_equiv="Content-Security-Policy", content=policy),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("meta", name="color-scheme", content="light dark"),
        void("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Safe(style)),
    )
    data = (
        tag("script", Safe(text), type="application/json", id=name) for name, text in blocks.items()
    )
    whole = tag("html", head, tag("body", body, *data, tag("script", Safe(script))), lang="en")
    return f"<!doctype html>\n{whole}\n".encode()


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
