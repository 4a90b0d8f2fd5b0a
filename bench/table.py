"""Plain-text tables."""

from collections.abc import Sequence


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, totals: Sequence[str] | None = None) -> str:
    """Columns under their headers, two spaces apart; columns of numbers stand to the right. `totals` is a row below a rule."""
    every_row = [*rows, totals] if totals is not None else list(rows)
    widths = [max(len(row[column]) for row in [headers, *every_row]) for column in range(len(headers))]
    to_right = [all(_is_number(row[column]) for row in rows) for column in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(cells, widths, to_right, strict=True))
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    lines = [line(headers), rule, *map(line, rows)]
    if totals is not None:
        lines += [rule, line(totals)]
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    """A number, perhaps with a % sign, or the dash that stands for none."""
    return cell in ("", "-") or cell.removesuffix("%").replace(".", "", 1).replace(",", "").isdigit()
