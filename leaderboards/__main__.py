"""Rebuild what the repository shows from the committed records: `python -m leaderboards` (make leaderboards)."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmark import plots, protocol, record
from benchmark.errors import UserError
from benchmark.files import write_bytes
from leaderboards import reproduction, tables

README = protocol.LEADERBOARDS.parent / "README.md"
REPRODUCTION = protocol.LEADERBOARDS / "REPRODUCTION.md"
SHOWN = "cifar100-lite@1"  # in the README


def build(folder: Path) -> str:
    """README.md and matrices.png of one leaderboard; returns its main table with its legend."""
    definition, found = protocol.load(folder), tables.rows(folder)
    metric, first = definition.primary_metric, found[0].records[0]
    legend = tables.LEGEND.format(metric=metric)
    text = [f"# {folder.name}", definition.description + ".", "![compatibility matrices](matrices.png)", legend]
    steps = tables.upgrades(tables.independent_row(folder, found), metric)
    said = [f"{step}: {100 * i.mean:+.1f} ({100 * i.lower:+.1f} to {100 * i.upper:+.1f})" for step, i in steps.items()]
    text += [f"Steps of independent training, own queries on own gallery, points of {metric}: " + "; ".join(said) + "."]
    for stratum in record.ordered(first.matrices[metric]):
        text += [
            f"## {metric}, queries: {stratum} ({first.queries[stratum]:,})",
            tables.table(folder, found, metric, stratum),
        ]
    for other in first.matrices:
        if other != metric:
            text += [f"## {other}, all queries", tables.table(folder, found, other)]
    text += ["Made from the records in this folder by `make leaderboards`; nothing here is typed by hand."]
    write_bytes(folder / "README.md", ("\n\n".join(text) + "\n").encode())
    records = [one for row in found for one in row.records]
    plots.save(plots.matrices_figure(records, metric), folder / "matrices.png")
    return tables.table(folder, found, metric) + "\n\n" + legend


def main() -> int:
    try:
        for name in protocol.shipped():
            folder = protocol.LEADERBOARDS / name
            if not any(folder.glob("*/seed*.safetensors")) or not (folder / "Independent").is_dir():
                continue
            table = build(folder)
            print(f"{name}: README.md, matrices.png")
            if name == SHOWN:
                before, rest = README.read_text().split("<!-- table -->\n")
                after = rest.partition("<!-- end -->")[2]
                write_bytes(README, f"{before}<!-- table -->\n{table}\n<!-- end -->{after}".encode())
        write_bytes(REPRODUCTION, reproduction.render(reproduction.load()).encode())
        print(REPRODUCTION.name)
    except UserError as error:
        print(f"leaderboards: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
