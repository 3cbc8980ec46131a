"""The words of the command line: every command with its options. What they do stands in `__main__`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser

from benchmark import __version__, doors
from benchmark.errors import UserError

WORDS = {"int": "an integer", "float": "a number"}  # for people
POSITIONAL = ("protocol", "what")


class Parser(ArgumentParser):
    """Mistakes in one line that names the option as it was typed."""

    def error(self, message: str, *_: object) -> NoReturn:
        raise UserError(one_line(message))


def one_line(message: str) -> str:
    """A parser's complaint: its keys as options ("audit.queries_old" is --queries-old), its types as words."""
    text = " ".join(message.split())
    if found := re.match(r"the following arguments are required: (.*)", text):
        return f"missing: {', '.join(map(_option, found[1].split(', ')))}; see --help"
    if found := re.match(
        r'Parser key "([^"]*)"(?: element \d+)?: Expected a <class \'(\w+)\'>\. Got value: (.*)', text
    ):
        return f"{_option(found[1])} takes {WORDS.get(found[2], found[2])}, not '{found[3]}'"
    return re.sub(r'(?:Parser )?key "([^"]*)"', lambda key: _option(key[1]), text, flags=re.IGNORECASE)


def _option(key: str) -> str:
    name = key.rpartition(".")[2]
    return name if name in POSITIONAL else "--" + name.lstrip("-").replace("_", "-")


class Help(argparse.HelpFormatter):
    """Defaults where there are any that a person would want to know, and no Python types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, False, [], argparse.SUPPRESS) or "(default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown})".strip().replace("%", "%%")


def work_options(sub: ArgumentParser, seeds: bool = True) -> None:
    """What every command has that computes on a protocol."""
    if seeds:
        sub.add_argument(
            "--seed", nargs="+", default=["first"], help="seeds of the protocol, or 'all' (default: its first)"
        )
    sub.add_argument("--data", type=Path, help="folder with the data")
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="where results and cached work go (default: runs)")
    sub.add_argument("--jobs", type=int, default=1, help="nodes computed side by side")
    sub.add_argument("--threads", type=int, help="CPU threads per job (default: cores / jobs)")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")


def change_options(sub: ArgumentParser) -> None:
    """What departs from a method's own settings, or from the protocol."""
    sub.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a hyperparameter of the method")
    sub.add_argument(
        "--override", action="append", default=[], metavar="PATH=VALUE", help="change the protocol: off-protocol"
    )


def make_parser() -> ArgumentParser:
    parser = Parser(
        prog="compatbench",
        description="The benchmark of compatible representation learning: upgrade an embedding model, keep the gallery.",
        version=__version__,
        formatter_class=Help,
    )
    commands = parser.add_subcommands(required=True, dest="subcommand")

    def command(name: str, summary: str, example: str) -> ArgumentParser:
        sub = Parser(description=f"{summary} Example: {example}", formatter_class=Help)
        commands.add_subcommand(name, sub, help=summary)
        return sub

    run = command(
        "run",
        "Train and evaluate methods on a protocol; resumable, nothing is computed twice.",
        "compatbench run cifar100-lite@1 --method BCT --seed 0 --data DIR",
    )
    run.add_argument("protocol", help="leaderboard name, its folder, or a YAML file")
    run.add_argument("--method", nargs="+", required=True, help="names, 'all', or package.module.Class of your own")
    work_options(run)
    change_options(run)
    run.add_argument(
        "--mode",
        choices=["chain", "pairwise"],
        default="chain",
        help="old = own release before, or the independent one",
    )
    run.add_argument("--split", choices=["test", "validation"], default="test", help="whose queries and gallery")
    run.add_argument("--tuned", action="store_true", help="at the settings that `tune` chose on the protocol")
    run.add_argument(
        "--wandb", choices=["online", "offline", "disabled"], help="default: online with a key, else offline"
    )
    run.add_argument("--publish", action="store_true", help="also write the records into the protocol's leaderboard")
    run.add_argument("--dry-run", action="store_true", help="print the plan and its cost, compute nothing")

    backfill = command(
        "backfill",
        "Accuracy while the gallery is being re-embedded: curves of methods, or a plan's forecast (--plan).",
        "compatbench backfill cifar100-lite@1 --method FastFill RQT --data DIR",
    )
    backfill.add_argument("protocol", nargs="?", help="leaderboard name, its folder, or a YAML file")
    backfill.add_argument("--method", nargs="+", default=[], help="names of methods")
    work_options(backfill)
    change_options(backfill)
    backfill.add_argument("--tuned", action="store_true", help="at the settings that `tune` chose on the protocol")
    backfill.add_argument("--publish", action="store_true", help="also write the records into the leaderboard")
    backfill.add_argument("--plan", type=Path, help="a YAML file: forecast of one backfill in hours; needs no data")
    backfill.add_argument("--png", type=Path, help="the chart (default: backfill.png beside the records)")

    pairs = command(
        "pairs",
        "Which map between two spaces is best at 100, 1,000 and 10,000 pairs, on a protocol's releases.",
        "compatbench pairs cifar100-lite@1 --data DIR",
    )
    pairs.add_argument("protocol", help="leaderboard name")
    work_options(pairs)
    pairs.add_argument("--publish", action="store_true", help="also write the record into the leaderboard")

    tune = command(
        "tune",
        "Choose a method's hyperparameters by the tuning rule: six trials on the validation split, logged.",
        "compatbench tune cifar100-lite@1 --method BCT --data DIR",
    )
    tune.add_argument("protocol", help="leaderboard name")
    tune.add_argument("--method", nargs="+", required=True, help="names of methods")
    work_options(tune, seeds=False)

    listing = command("list", "Names of methods, tasks and leaderboards.", "compatbench list methods --verbose")
    listing.add_argument("what", nargs="?", choices=["methods", "tasks", "leaderboards", "all"], default="all")
    listing.add_argument("--verbose", action="store_true", help="hyperparameters with defaults and tuning space")

    doctor = command(
        "doctor", "Check machine, packages and data before hours are spent.", "compatbench doctor --data DIR"
    )
    doctor.add_argument("--protocol", nargs="+", help="check these only (default: all)")
    doctor.add_argument("--data", type=Path, help="folder with the data")

    show = command(
        "show", "Matrix and summary of records or of a leaderboard.", "compatbench show cifar100-lite@1 --png out.png"
    )
    show.add_argument("what", help="a record, a folder of records, or a leaderboard's name")
    show.add_argument("--metric", help="cmc@1, cmc@5 or map (default: the protocol's primary metric)")
    show.add_argument("--stratum", default="all", help="all, old-seen, new-only, never-seen")
    show.add_argument("--png", type=Path, help="write the matrices as a picture")

    evaluate = command(
        "evaluate",
        "Exact metrics of your own embeddings (.npy or .safetensors).",
        "compatbench evaluate --queries q.npy --gallery g.npy --query-labels ql.npy --gallery-labels gl.npy",
    )
    evaluate.add_argument(
        "--queries", type=Path, required=True, help="(N, D); a safetensors file may hold labels and ids too"
    )
    evaluate.add_argument("--gallery", type=Path, help="(M, D); without it every query searches all others")
    evaluate.add_argument("--query-labels", type=Path, help="(N,) integers, .npy")
    evaluate.add_argument("--gallery-labels", type=Path, help="(M,) integers, .npy")
    evaluate.add_argument("--query-ids", type=Path, help="with gallery ids: an item never retrieves itself")
    evaluate.add_argument("--gallery-ids", type=Path, help="(M,) integers, .npy")
    evaluate.add_argument("--similarity", choices=["cosine", "l2"], default="cosine", help="what ranks")
    evaluate.add_argument("--json", action="store_true", help="machine-readable output")

    doors.adapt_arguments(
        command(
            "adapt",
            "Fit an adapter to paired embeddings, or apply one to a file of any size.",
            "compatbench adapt --old old.npy --new new.npy --method Procrustes Ridge --out adapter.safetensors",
        )
    )

    doors.audit_arguments(
        command(
            "audit",
            "Is an adapter good enough to go without re-embedding? No labels needed.",
            "compatbench audit --queries-old qo.npy --queries-new qn.npy --gallery-old go.npy --gallery-new gn.npy "
            "--adapter adapter.safetensors",
        )
    )

    demo = command("demo", "Four methods on the bundled digits, in a minute.", "compatbench demo")
    demo.add_argument("--runs", type=Path, default=Path("runs"), help="where results and cached work go")
    return parser
