"""Numbers and names as people read them."""

from __future__ import annotations

__all__ = ["age", "clean", "duration", "size"]


def clean(text: str) -> str:
    """Return text with everything that a terminal might obey or hide written as an escape."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def size(count: float) -> str:
    """Return a number of bytes with a decimal unit: `45 MB`."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5 or unit == "TB":
            break
    return f"{count:.1f} {unit}" if count < 9.95 else f"{count:.0f} {unit}"


def duration(seconds: float) -> str:
    """Return a short time with the unit that fits: `1.2 ms`."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s"


def age(seconds: float) -> str:
    """Return how long ago something was: `1.2s ago`, `3m 20s ago`."""
    if seconds < 99.95:
        return f"{max(seconds, 0.0):.1f}s ago"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest}s ago"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h {minutes}m ago"
    days, hours = divmod(hours, 24)
    return f"{days}d {hours}h ago"
