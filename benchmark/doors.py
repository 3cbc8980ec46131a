"""The command lines `adapt` and `audit`, for people who have files of embeddings and no training code.

Light to import: torch and the rest come with the command that is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from benchmark.errors import UserError

if TYPE_CHECKING:
    from benchmark.adapt import Fits

FILES = "embeddings are .npy, .safetensors ('embeddings', 'ids') or .parquet (vector, id, other columns)"


def adapt_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--old", type=Path, help=f"the pairs by the old model; {FILES}")
    parser.add_argument("--new", type=Path, help="the same items by the new model; by id, else row by row")
    parser.add_argument(
        "--method", nargs="+", default=["Procrustes"], help="names or 'all'; of several the best is kept"
    )
    _map_arguments(parser)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a hyperparameter")
    parser.add_argument("--apply", type=Path, help="adapt this file, of any size; an interrupted run goes on")
    parser.add_argument("--adapter", type=Path, help="with --apply: the fitted adapter")
    parser.add_argument("--out", type=Path, required=True, help="the adapter (.safetensors), or the adapted file")


def _map_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--side",
        choices=["query", "gallery"],
        default="query",
        help="query: new to old; gallery: stored vectors to new",
    )
    parser.add_argument("--similarity", choices=["cosine", "l2"], default="cosine")
    parser.add_argument("--pairs", type=int, help="fit to so many pairs, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0)


def command_adapt(args: Namespace, settings: Mapping[str, Any]) -> None:
    from rich import get_console

    console = get_console()
    if args.apply:
        if args.old or args.new or not args.adapter:
            raise UserError("--apply takes a fitted --adapter, and neither --old nor --new")
        from benchmark.adapt import apply

        with bar(f"adapting {args.apply.name}") as progress:
            rows, before = apply(args.apply, args.adapter, args.out, progress)
        resumed = f" (the first {before:,} by an earlier run)" if before else ""
        console.print(f"{rows:,} vectors adapted{resumed}: {args.out}", soft_wrap=True)
        return
    if not (args.old and args.new) or args.adapter:
        raise UserError("give --old and --new to fit an adapter, or --apply and --adapter to use one")
    if args.out.suffix != ".safetensors":
        raise UserError(f"{args.out}: an adapter is written as .safetensors; name it so")
    with console.status("loading torch"):
        from benchmark import adapters
        from benchmark.adapt import fit
    methods = list(adapters.KINDS) if "all" in args.method else args.method
    with bar("reading pairs") as progress:
        fits = fit(
            args.old, args.new, methods, side=args.side, similarity=args.similarity, pairs=args.pairs,
            settings=settings, seed=args.seed, progress=progress,
        )  # fmt: skip
    best = fits.ranked[0]
    adapters.save(args.out, best.adapter, best.notes)
    console.print(fits.note, soft_wrap=True)
    _show(console, fits)
    target = "the stored gallery" if args.side == "gallery" else "new queries"
    console.print(f"{best.adapter.kind} written: {args.out}; for {target}: compatbench adapt --apply FILE --adapter {args.out} --out OUT",
                  soft_wrap=True)  # fmt: skip


def _show(console: Any, fits: Fits) -> None:
    from rich.table import Table

    notes = fits.ranked[0].notes
    table = Table(title=f"{notes['pairs']} pairs, {notes['held out']} of them held out, {notes['side']} side")
    for column in ("method", "overlap@10", "fidelity", "numbers stored", "multiply-adds", "fit, s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for fit in fits.ranked:
        table.add_row(
            fit.adapter.kind, f"{fit.overlap:.4f}", f"{fit.fidelity:.4f}", f"{fit.adapter.parameters_count:,}",
            f"{fit.adapter.multiply_adds:,}", f"{fit.seconds:.2f}",
        )  # fmt: skip
    table.caption = (
        "overlap@10 of held-out items with the target model's own ranking; fidelity: mean cosine with its own vectors; "
        "multiply-adds: per vector"
    )
    console.print(table)
    for name, reason in fits.refused.items():
        console.print(f"{name} left out: {reason}", soft_wrap=True, highlight=False)


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of rows, shown on a terminal only and gone afterwards."""
    from rich import get_console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = get_console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
