"""Plain pieces of the generated pages."""

from collections.abc import Sequence


def ratio(of: Sequence[float]) -> str:
    """A median with its quartiles."""
    return f"{of[0]:.2f}× ({of[1]:.2f}-{of[2]:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
