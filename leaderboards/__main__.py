"""Rebuild what the repository shows from the committed records: `python -m leaderboards` (make leaderboards)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from benchmark import curve_plots, plots, protocol
from benchmark.errors import UserError
from benchmark.files import write_bytes
from leaderboards import backfills, pages, reproduction, tables

README = protocol.LEADERBOARDS.parent / "README.md"
SHOWN = "cifar100-lite@1"  # in the README
PICTURED = 2  # rows of each kind and size: a picture of all would be taller than any screen


def boards() -> list[Path]:
    """Leaderboards that have rows and their bounds."""
    folders = [protocol.LEADERBOARDS / name for name in protocol.shipped()]
    return [f for f in folders if any(f.glob("*/seed*.safetensors")) and (f / "Independent").is_dir()]


def texts(folder: Path, found: list[tables.Row]) -> Iterator[tuple[Path, str]]:
    """Every page made from one leaderboard, and what it says."""
    files, shown = pages.page(folder, found)
    yield from ((folder / name, text) for name, text in files.items())
    if folder.name == SHOWN:
        before, rest = README.read_text().split("<!-- table -->\n")
        after = rest.partition("<!-- end -->")[2]
        yield README, f"{before}<!-- table -->\n{shown}\n<!-- end -->{after}"


def main() -> int:
    try:
        for folder in boards():
            found = tables.rows(folder)
            for path, text in texts(folder, found):
                write_bytes(path, text.encode())
            records = [one for row in tables.best(found, PICTURED) for one in row.records]
            metric = protocol.load(folder).primary_metric
            plots.save(plots.matrices_figure(records, metric), folder / "matrices.png")
            if filled := backfills.read(folder):
                plots.save(curve_plots.backfill_figure(filled, metric), folder / "backfill.png")
            print(f"{folder.name}: README.md, table.csv, pictures")
        write_bytes(reproduction.PAGE, reproduction.render(reproduction.load()).encode())
        print(reproduction.PAGE.name)
    except UserError as error:
        print(f"leaderboards: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
