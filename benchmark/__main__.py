"""The command line: the only place where everything meets. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from benchmark import catalog, doors
from benchmark import protocol as protocols
from benchmark.asked import chosen_methods, chosen_seeds, settings
from benchmark.errors import UserError, unknown
from benchmark.parser import make_parser

if TYPE_CHECKING:
    from benchmark.plan import Node, Plan
    from benchmark.record import Record

DEMO = ("Independent", "BCT", "BT2", "OCA")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 a mistake that the one line on stderr names, 130 stopped by Ctrl-C."""
    warnings.formatwarning = lambda message, *_, **__: f"compatbench: warning: {message}\n"
    try:
        refuse_foreign_modules()
        parser = make_parser()
        args = parser.parse_args(arguments)
        return COMMANDS[args.subcommand](args[args.subcommand]) or 0
    except UserError as error:
        print(f"compatbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncompatbench: stopped; nothing is lost, the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # `compatbench list | head` is no error
        return 0


def refuse_foreign_modules() -> None:
    """`tasks` is a common name: another one on the path would be imported in place of ours."""
    for name in ("tasks", "leaderboards"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).parent if spec and spec.origin else None
        if found != catalog.ROOT / name:
            where = found or (next(iter(spec.submodule_search_locations or ["?"])) if spec else "missing")
            raise UserError(
                f"the module '{name}' on the Python path is not CompatBench's ({where}); run from another folder, or take that "
                f"path out of PYTHONPATH"
            )


def command_run(args: Namespace) -> None:
    from rich import get_console

    protocol = protocols.load(args.protocol, args.override)
    names = chosen_methods(protocol, args.method)
    run_protocol(get_console(), protocol, names, chosen_seeds(protocol, args.seed), args)


def run_protocol(
    console: Any, protocol: protocols.Protocol, names: Sequence[str], seeds: Sequence[int], args: Namespace
) -> list[Record]:
    """Plan, compute, assemble, log: the body of `run` and `demo`."""
    given = settings(args.set)
    with console.status("loading torch and lightning"):
        from benchmark import console as progress
        from benchmark import plots, results, tracking
        from benchmark.plan import MethodRun, build
        from benchmark.runner import default_device, execute, open_task
        from benchmark.store import Store
        from benchmark.tuning import tuned
    tracking.check(args.wandb)
    if args.tuned and given:
        raise UserError("--tuned takes its hyperparameters from the tuning log; leave out --set")
    methods = [tuned(protocol, name) if args.tuned else MethodRun.of(name, given) for name in names]
    store = Store(args.runs)
    with console.status(f"reading the data of {protocol.task}"):
        task = open_task(protocol, args.data, args.device or default_device())
    for line in task.facts():
        console.print(line, highlight=False, soft_wrap=True)
    plans = [
        build(protocol, method, seed, task.fingerprint, args.mode, args.split) for seed in seeds for method in methods
    ]
    if args.dry_run:
        table, line = progress.plan_table(plans, task, store)
        console.print(table, line, sep="\n")
        return []
    with progress.Bars(console) as bars:
        bars.expect(plans, store)
        execute(plans, task, store, jobs=args.jobs, threads=args.threads, progress=bars)
    records = []
    with console.status("intervals, pictures, records"):
        for plan in plans:
            folder = record_folder(args, plan)
            record, path = results.assemble(plan, task, store, folder, args.override)
            plots.save(plots.heatmap(record, protocol.primary_metric), path.with_suffix(".png"))
            tracking.log(record, path, args.wandb, args.runs)
            if args.publish:
                results.publish(record, path)
            records.append(record)
    for record in records:
        console.print(plots.terminal(record, protocol.primary_metric, None if len(records) == 1 else ["all"]))
    console.print(plots.summary_table(records, protocol.primary_metric))
    console.print(progress.shared(plans, store), soft_wrap=True)
    where = {str(record_folder(args, plan)) for plan in plans}
    console.print("records and heat maps: " + ", ".join(sorted(where)), soft_wrap=True)
    return records


def record_folder(args: Namespace, plan: Plan) -> Path:
    """One folder for every way to run a method, so that no record replaces another's."""
    from benchmark.protocol import digest

    name = plan.method.name
    if plan.method.settings == "custom":
        name += "+" + digest(plan.method.hyperparameters)[:6]
    marks = (
        [plan.mode] * (plan.mode != "chain")
        + [plan.split] * (plan.split != "test")
        + ["off-protocol"] * bool(args.override)
    )
    return args.runs / plan.protocol.id / "-".join([name, *marks])


def command_backfill(args: Namespace) -> None:
    from rich import get_console

    console = get_console()
    if args.plan:
        from benchmark import advice, plots, simulator

        forecast = simulator.forecast(simulator.load(args.plan))
        console.print(*advice.report(forecast), sep="\n", highlight=False)
        if args.png:
            plots.save(advice.figure(forecast), args.png)
            console.print(f"chart: {args.png}", soft_wrap=True)
        return
    if not args.protocol or not args.method:
        raise UserError("backfill needs a protocol and --method, or --plan FILE")
    protocol, given = protocols.load(args.protocol, args.override), settings(args.set)
    names = chosen_methods(protocol, args.method)
    if args.tuned and given:
        raise UserError("--tuned takes its hyperparameters from the tuning log; leave out --set")
    with console.status("loading torch and lightning"):
        from benchmark import backfilling, curve_plots, plots, results
        from benchmark import console as progress
        from benchmark.plan import MethodRun, build
        from benchmark.runner import default_device, execute, open_task
        from benchmark.store import Store
        from benchmark.tuning import tuned
    methods = [tuned(protocol, name) if args.tuned else MethodRun.of(name, given) for name in names]
    store = Store(args.runs)
    with console.status(f"reading the data of {protocol.task}"):
        task = open_task(protocol, args.data, args.device or default_device())
    plans = [build(protocol, m, seed, task.fingerprint) for seed in chosen_seeds(protocol, args.seed) for m in methods]
    served = {(plan.method.name, plan.seed): backfilling.nodes(plan) for plan in plans}
    for name, found in {name: found for (name, _), found in served.items()}.items():
        if not found:
            console.print(f"{name}: no curve, as no release has a link to items of another", highlight=False)
    plans = [plan for plan in plans if served[plan.method.name, plan.seed]]
    if not plans:
        return
    wanted: list[Plan | Node] = [*plans, *(node for found in served.values() for node in found)]
    with progress.Bars(console) as bars:
        bars.expect(wanted, store)
        execute(wanted, task, store, jobs=args.jobs, threads=args.threads, progress=bars)
    records = []
    for plan in plans:
        record = backfilling.record(plan, task, store, args.override)
        path = record.save(record_folder(args, plan) / f"backfill-seed{plan.seed}.json")
        if args.publish:
            results.publish_backfill(record, path)
        records.append(record)
    console.print(curve_plots.backfill_table(records, protocol.primary_metric))
    chart = args.png or args.runs / protocol.id / "backfill.png"
    plots.save(curve_plots.backfill_figure(records, protocol.primary_metric), chart)
    console.print(f"records: {args.runs / protocol.id}; chart: {chart}", soft_wrap=True)


def command_pairs(args: Namespace) -> None:
    from rich import get_console
    from rich.markdown import Markdown

    console, protocol = get_console(), protocols.load(args.protocol)
    seeds = chosen_seeds(protocol, args.seed)
    with console.status("loading torch and lightning"):
        from benchmark import budgets
        from benchmark import console as progress
        from benchmark.runner import default_device, open_task
        from benchmark.store import Store
    task = open_task(protocol, args.data, args.device or default_device())
    with progress.Bars(console) as bars:
        record = budgets.study(
            protocol, task, Store(args.runs), seeds, jobs=args.jobs, threads=args.threads, progress=bars
        )
    console.print(Markdown(budgets.markdown(record)))
    if args.publish:
        console.print(f"record: {budgets.publish(record)}; a row of the table needs all seeds", soft_wrap=True)


def command_tune(args: Namespace) -> None:
    from rich import get_console
    from rich.table import Table

    console = get_console()
    protocol = protocols.load(args.protocol)
    with console.status("loading torch and lightning"):
        from benchmark import console as progress
        from benchmark import tuning
        from benchmark.bill import row_nodes
        from benchmark.runner import default_device, open_task
        from benchmark.store import Store
    names = [name for item in args.method for name in item.split(",")]
    for name in names:
        tuning.settings(name)  # a method without a space dies before the first trial of another
    store, device = Store(args.runs), args.device or default_device()
    task = open_task(tuning.shortened(protocol), args.data, device)
    for name in names:
        with progress.Bars(console) as bars:
            bars.expect([node for plan in tuning.plans(name, task) for node in row_nodes(plan)], store)
            lines = tuning.tune(protocol, name, task, store, jobs=args.jobs, threads=args.threads, progress=bars)
        table = Table("trial", "hyperparameters", "AM, validation", title=f"{name} on {protocol.id}")
        for line in lines:
            mark = " (best)" if line is tuning.best(lines) else ""
            table.add_row(str(line["trial"]), _settings_text(line["hyperparameters"]), f"{100 * line['am']:.2f}{mark}")
        console.print(table)
        console.print(
            f"log: {tuning.log(protocol, name)}; its row: compatbench run {protocol.id} --method {name} --tuned"
        )


def command_list(args: Namespace) -> None:
    from rich import get_console
    from rich.table import Table

    console = get_console()  # the one that progress bars elsewhere nest under
    if args.what in ("methods", "all"):
        table = Table("method", "what it is", "variants")
        for entry in [*catalog.entries("method").values(), *catalog.entries("two-sided method").values()]:
            variants = "\n".join(f"{name}{entry.mark}: {_settings_text(v)}" for name, v in entry.variants.items())
            table.add_row(entry.name + entry.mark, entry.summary, variants)
        table.caption = catalog.RECONSTRUCTION
        console.print(table)
    if args.what in ("tasks", "all"):
        table = Table("task", "what it is")
        for entry in catalog.entries("task").values():
            table.add_row(entry.name, entry.summary)
        console.print(table)
    if args.what in ("leaderboards", "all"):
        table = Table("leaderboard", "releases", "seeds", "metric")
        for name in protocols.shipped():
            protocol = protocols.load(name)
            table.add_row(name, protocol.description, str(len(protocol.seeds)), protocol.primary_metric)
        console.print(table)
    if args.verbose:
        _verbose(console)


def _settings_text(values: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _verbose(console: Any) -> None:
    """Hyperparameters need the classes themselves, hence torch."""
    from rich.table import Table

    table = Table("method", "hyperparameter", "default", "tuning space", "meaning")
    with console.status("loading torch and lightning"):
        for name in [*catalog.entries("method"), *catalog.entries("two-sided method")]:
            cls, defaults = catalog.method(name)
            meanings = catalog.argument_docs(cls)
            for key, value in defaults.items():
                space = ", ".join(map(str, cls.space.get(key, ())))
                table.add_row(name, key, str(value), space, meanings.get(key, ""))
    console.print(table)


def command_doctor(args: Namespace) -> int:
    from rich import get_console

    console = get_console()
    with console.status("checking machine, packages, data"):
        from benchmark import doctor

        checks = doctor.report(args.protocol, args.data)
    console.print(doctor.render(checks))
    return 0 if doctor.ok(checks) else 2


def command_show(args: Namespace) -> None:
    from rich import get_console

    from benchmark import plots, record

    path = Path(args.what)
    folder = path if path.exists() else protocols.LEADERBOARDS / args.what
    if not folder.exists():
        raise unknown("record, folder or leaderboard", args.what, protocols.shipped())
    files = [folder] if folder.is_file() else sorted(f for f in folder.glob("**/seed*.json") if f.parent.name != "old")
    records = [record.load(file) for file in files]
    if not records:
        raise UserError(f"{folder} holds no records (seed<n>.json); make some with `compatbench run`")
    metric = args.metric or protocols.load(records[0].protocol.id).primary_metric
    known = records[0].matrices
    if metric not in known:
        raise unknown("metric", metric, known)
    if args.stratum not in known[metric]:
        raise unknown("stratum", args.stratum, known[metric])
    console = get_console()
    if len(records) == 1:
        console.print(plots.terminal(records[0], metric, [args.stratum]))
    console.print(plots.summary_table(records, metric, args.stratum))
    if args.png:
        plots.save(plots.matrices_figure(records, metric, args.stratum), args.png)
        console.print(f"written: {args.png}", soft_wrap=True)


def command_evaluate(args: Namespace) -> None:
    from rich import get_console

    console = get_console()
    with console.status("counting"):
        from benchmark.evaluate import evaluate

        result = evaluate(
            args.queries,
            args.gallery,
            args.query_labels,
            args.gallery_labels,
            query_ids=args.query_ids,
            gallery_ids=args.gallery_ids,
            similarity=args.similarity,
        )
    if args.json:
        console.print_json(data=result)
    else:
        for name, value in result.items():
            console.print(f"{name:>10}  {value:.4f}" if isinstance(value, float) else f"{name:>10}  {value}")


def command_demo(args: Namespace) -> None:
    from rich import get_console

    console = get_console()
    protocol = protocols.load("digits@1")
    options = Namespace(
        set=[], override=[], runs=args.runs, data=None, device="cpu", mode="chain", split="test", jobs=1, threads=None,
        wandb="offline", publish=False, dry_run=False, tuned=False,
    )  # fmt: skip
    records = run_protocol(console, protocol, DEMO, [protocol.seeds[0]], options)
    from benchmark import plots

    picture = args.runs / protocol.id / "matrices.png"
    plots.save(plots.matrices_figure(records, protocol.primary_metric), picture)
    console.print(f"all matrices in one picture: {picture}", soft_wrap=True)
    console.print("next: compatbench run cifar100-lite@1 --method BCT --seed 0 --data DIR", soft_wrap=True)


COMMANDS: dict[str, Callable[[Namespace], int | None]] = {
    "run": command_run,
    "backfill": command_backfill,
    "pairs": command_pairs,
    "tune": command_tune,
    "list": command_list,
    "doctor": command_doctor,
    "show": command_show,
    "evaluate": command_evaluate,
    "adapt": lambda args: doors.command_adapt(args, settings(args.set)),
    "audit": doors.command_audit,
    "demo": command_demo,
}

if __name__ == "__main__":
    sys.exit(main())
