"""The command lines `adapt` and `audit`, for people who have files of embeddings and no training code.

Light to import: torch and the rest come with the command that is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from benchmark.errors import UserError
from benchmark.files import same_file

if TYPE_CHECKING:
    from benchmark.adapt import Fits

FILES = "embeddings are .npy, .safetensors ('embeddings', 'ids') or .parquet (vector, id, other columns)"


def adapt_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--old", type=Path, help=f"the pairs by the old model; {FILES}")
    parser.add_argument("--new", type=Path, help="the same items by the new model; by id, else row by row")
    parser.add_argument("--method", nargs="+", help="names or 'all'; of several the best is kept (default: Procrustes)")
    _side_arguments(parser)
    parser.add_argument("--pairs", type=int, help="fit to so many pairs, drawn at random (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a hyperparameter")
    parser.add_argument("--apply", type=Path, help="adapt this file, of any size; an interrupted run goes on")
    parser.add_argument("--adapter", type=Path, help="with --apply: the fitted adapter")
    parser.add_argument("--out", type=Path, required=True, help="the adapter (.safetensors), or the adapted file")


def audit_arguments(parser: ArgumentParser) -> None:
    for name, what in (("queries", "queries"), ("gallery", "stored gallery")):
        parser.add_argument(f"--{name}-old", type=Path, required=True, help=f"{what} by the old model; {FILES}")
        optional = name == "gallery"
        text = (
            "a random sample of it (by id), or all of it, by the new model" if optional else "the same by the new model"
        )
        parser.add_argument(f"--{name}-new", type=Path, required=not optional, help=text)
    parser.add_argument("--adapter", type=Path, help="what `compatbench adapt` wrote; or give pairs to fit one on:")
    parser.add_argument("--pairs-old", type=Path, help="items by the old model, best none of the queries and sample")
    parser.add_argument("--pairs-new", type=Path, help="the same by the new model")
    parser.add_argument(
        "--method", nargs="+", help="with pairs: names; of several the best is kept (default: Procrustes)"
    )
    _side_arguments(parser)
    parser.add_argument("--index", type=Path, help="faiss index of what is searched (old gallery, or adapted gallery)")
    parser.add_argument(
        "--search", metavar="NAME=VALUE", help="its search setting, as nprobe=16 (default: as it is set)"
    )
    parser.add_argument(
        "--query-labels",
        help=".npy or .safetensors with 'labels', row by row those of --queries-old; or a column of a query file",
    )
    parser.add_argument("--gallery-labels", help="the same of --gallery-old")
    parser.add_argument(
        "--slice",
        nargs="+",
        help="columns of the query files, numbers by quarters; all must be judged for a GO (default: those of 2 to 50 values)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="SCORE",
        help="in use: a cosine, with l2 a squared distance; or look for one:",
    )
    parser.add_argument("--accept", type=float, help="where this share of old best matches pass (default: 0.9)")
    parser.add_argument("--far", type=float, help="with labels: at this FAR of the old system (default: 0.001)")
    parser.add_argument("--gallery-size", type=int, help="items in service, if --gallery-old is a random part of them")
    parser.add_argument(
        "--encoder-rate", type=float, help="items a second of the new encoder, for the time of a backfill"
    )
    parser.add_argument(
        "--dual", type=float, nargs="+", default=[0.1, 0.5, 1.0], help="shares that a second index holds"
    )
    parser.add_argument(
        "--require-overlap", type=float, default=0.8, help="for a GO: least overlap@10 with the backfill, 0 to 1"
    )
    parser.add_argument("--require-slice", type=float, default=0.5, help="the same in every slice")
    parser.add_argument("--margin", type=float, default=0.05, help="most change of share accepted or TAR; most flips")
    parser.add_argument("--json", type=Path, help="write the whole report")
    parser.add_argument("--png", type=Path, help="draw overlap by way")


def spare_inputs(args: Namespace, outputs: Sequence[str]) -> None:
    """Refuses an output that is one of the inputs, by whatever path; all other options that are files count as inputs."""
    for output in outputs:
        out = args[output]
        for name, value in vars(args).items():
            if out and value and name not in outputs and isinstance(value, (str, Path)) and same_file(out, Path(value)):
                raise UserError(f"--{output} {out} would replace --{name.replace('_', '-')}; choose another name")


def command_audit(args: Namespace) -> None:
    from rich import get_console

    console = get_console()
    spare_inputs(args, ("json", "png"))
    if (args.pairs_old is None) != (args.pairs_new is None):
        raise UserError("give both --pairs-old and --pairs-new, or a fitted --adapter")
    if args.png and not args.gallery_new:
        raise UserError("--png draws overlaps with the full backfill: give --gallery-new")
    with console.status("loading torch"):
        from benchmark import plots
        from benchmark.audit import Requirements, audit
        from benchmark.audit.report import picture, render
        from benchmark.files import write_json
    with console.status("searching and counting"):
        report = audit(
            args.queries_old, args.queries_new, args.gallery_old, args.gallery_new, adapter=args.adapter,
            pairs=(args.pairs_old, args.pairs_new) if args.pairs_old else None, methods=args.method, side=args.side,
            similarity=args.similarity, index=args.index, settings=args.search, query_labels=args.query_labels,
            gallery_labels=args.gallery_labels, slices=args.slice, accept=args.accept, far=args.far,
            score=args.threshold, gallery_size=args.gallery_size, encoder_rate=args.encoder_rate, dual=args.dual,
            require=Requirements(args.require_overlap, args.require_slice, args.margin), seed=args.seed,
        )  # fmt: skip
    console.print(render(report))
    if args.json:
        write_json(args.json, report)
    if args.png:
        plots.save(picture(report), args.png)


def _side_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--side",
        choices=["query", "gallery"],
        help="query: new to old; gallery: stored vectors to new (default: query)",
    )
    parser.add_argument("--similarity", choices=["cosine", "l2"], help="what the search ranks by (default: cosine)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")


def command_adapt(args: Namespace, settings: Mapping[str, Any]) -> None:
    from rich import get_console

    console = get_console()
    spare_inputs(args, ("out",))
    if args.apply:
        if args.old or args.new or not args.adapter:
            raise UserError("--apply takes a fitted --adapter, and neither --old nor --new")
        for name in ("method", "side", "similarity", "pairs", "set"):
            if args[name]:
                raise UserError(f"--{name} is of the fit, and the adapter says it; leave it out with --apply")
        from benchmark.adapt import apply

        with bar(f"adapting {args.apply.name}") as progress:
            rows, before = apply(args.apply, args.adapter, args.out, progress)
        resumed = f" (the first {before:,} by an earlier run)" if before else ""
        console.print(f"{rows:,} vectors adapted{resumed}: {args.out}", soft_wrap=True, markup=False)
        return
    if not (args.old and args.new) or args.adapter:
        raise UserError("give --old and --new to fit an adapter, or --apply and --adapter to use one")
    if args.out.suffix != ".safetensors":
        raise UserError(f"{args.out}: an adapter is written as .safetensors; name it so")
    with console.status("loading torch"):
        from benchmark import adapters
        from benchmark.adapt import fit
    if args.out.exists() and not adapters.is_adapter(args.out):
        raise UserError(f"{args.out}: holds something else than an adapter, which would be lost; choose another name")
    methods = args.method or ["Procrustes"]
    methods = list(adapters.KINDS) if "all" in methods else methods
    with bar("reading pairs") as progress:
        fits = fit(
            args.old, args.new, methods, side=args.side or "query", similarity=args.similarity or "cosine",
            pairs=args.pairs, settings=settings, seed=args.seed, progress=progress,
        )  # fmt: skip
    best = fits.ranked[0]
    adapters.save(args.out, best.adapter, best.notes)
    console.print(fits.note, soft_wrap=True, markup=False)
    _show(console, fits)
    console.print(f"{best.adapter.kind} written: {args.out}", soft_wrap=True, markup=False)
    console.print(f"next: compatbench adapt --apply FILE --adapter {args.out} --out OUT", soft_wrap=True, markup=False)


def _show(console: Any, fits: Fits) -> None:
    from rich.table import Table

    from benchmark.adapt import reasons

    notes, best = fits.ranked[0].notes, fits.ranked[0].judged
    title = f"{notes['pairs']} pairs, {notes['held out']} of them held out, {notes['side']} side"
    table = Table(title=f"{title}; overlap@{best.k} by chance: {best.chance:.3f}")
    for column in ("method", f"overlap@{best.k}", "fidelity", "numbers stored", "multiply-adds", "fit, s"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
    for fit in fits.ranked:
        table.add_row(
            fit.adapter.kind, f"{fit.overlap:.4f}", f"{fit.fidelity:.4f}", f"{fit.adapter.parameters_count:,}",
            f"{fit.adapter.multiply_adds:,}", f"{fit.seconds:.2f}",
        )  # fmt: skip
    table.caption = (
        f"overlap@{best.k} of held-out items with the target model's own ranking; fidelity: mean cosine with its "
        "own vectors; multiply-adds: per vector"
    )
    console.print(table)
    for reason in reasons(fits.refused):
        console.print(f"left out: {reason}", soft_wrap=True, markup=False, highlight=False)


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
