"""What `compatbench run` shows while it works, and what `--dry-run` shows before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from benchmark.images import ways
from benchmark.plan import Node, Plan
from benchmark.store import Store
from benchmark.task import Task

WEIGHT = {"train": 30}  # of a node in the overall bar; all others count 1


class Bars:
    """Progress of `runner.execute`: one bar for everything, one for each node at work. Without a terminal, a line a training."""

    def __init__(self, console: Console):
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.overall = self.bars.add_task("all work", total=0)
        self.tasks: dict[str, TaskID] = {}

    def expect(self, wanted: Iterable[Plan | Node], store: Store) -> None:
        """Say how much there is to do."""
        nodes = {node.id: node for item in wanted for node in (item.nodes if isinstance(item, Plan) else item.walk())}
        left = [node for node in nodes.values() if not store.done(node)]
        self.bars.update(self.overall, total=sum(WEIGHT.get(node.kind, 1) for node in left))
        self.console.print(
            f"{len(nodes)} nodes, {len(nodes) - len(left)} cached, {sum(n.kind == 'train' for n in left)} to train"
        )

    def __call__(self, event: str, node: Node, done: int, total: int) -> None:
        if event == "start":
            self.tasks[node.id] = self.bars.add_task(node.label[:60], total=total)
        elif event == "step":
            self.bars.update(self.tasks[node.id], completed=done, total=total)
        elif event == "done":
            self.bars.remove_task(self.tasks.pop(node.id))
            self.bars.advance(self.overall, WEIGHT.get(node.kind, 1))
            if node.kind == "train":
                self.console.print(f"[dim]done:[/] {node.label}, seed {node.spec['seed']}", highlight=False)

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()


def plan_table(plans: Sequence[Plan], task: Task, store: Store) -> tuple[Table, str]:
    """Every node once, who needs it, whether it is cached, and the work: images through a network, backward passes as two."""
    table = Table(title=f"plan of {plans[0].protocol.id}")
    for column in ("node", "for", "state"):
        table.add_column(column, overflow="fold")
    table.add_column("work (1,000 images)", justify="right")
    users: dict[str, list[str]] = {}
    nodes: dict[str, Node] = {}
    for plan in plans:
        for node in plan.nodes:
            nodes[node.id] = node
            users.setdefault(node.id, []).append(f"{plan.method.name}/{plan.seed}")
    for node in nodes.values():
        state = "[green]cached[/]" if store.done(node) else "to do"
        table.add_row(node.label, " ".join(sorted(set(users[node.id]))), state, f"{work(node, task) / 1000:.1f}")
    left = [node for node in nodes.values() if not store.done(node)]
    alone = sum(len(plan.nodes) for plan in plans)
    total = sum(work(node, task) for node in left)
    line = (
        f"{len(nodes)} nodes ({alone} if nothing were shared), {len(nodes) - len(left)} cached, {len(left)} to do: "
        f"{total / 1e6:.2f} million images; {expected(nodes.values(), task, store, left)}"
    )
    return table, line


def shared(plans: Sequence[Plan], store: Store) -> str:
    """What sharing has saved: the time of all rows if each had been run alone, against every node once."""
    seconds = {
        node.id: store.read_json(node, "timing.json")["seconds"] for plan in plans for node in plan.nodes
    }  # of cached nodes: when they were made
    once, alone = sum(seconds.values()), sum(seconds[node.id] for plan in plans for node in plan.nodes)
    return (
        f"{len(plans)} rows: {once / 60:.1f} minutes of work, {alone / 60:.1f} if each row had been run alone: sharing saved "
        f"{1 - once / alone:.0%}"
    )


def work(node: Node, task: Task) -> int:
    """Images through a network, a training step counted as three (forward, backward); 0 where no image is read."""
    if node.kind == "train":
        recipe = task.protocol.releases[node.spec["t"]].recipe
        teachers = sum(kind == "encoder" for kind, _ in node.spec["needs"].values())
        passes = min(recipe.epochs, ways(recipe.augment) or recipe.epochs)  # where there are few views, they are kept
        return (3 * recipe.epochs + passes * teachers) * task.train_size(node.spec["t"])
    if node.kind == "embed":
        split, _, side = node.spec["items"].partition(":")
        if split == "train":
            return task.train_size(int(side.partition(":")[0]))
        return len(task.items(split, side)[0])
    return 0


def expected(nodes: Iterable[Node], task: Task, store: Store, left: Sequence[Node]) -> str:
    """A time from this machine's own finished trainings of the same releases, or where to get one."""
    seconds: dict[int, list[float]] = {}
    for node in nodes:
        if node.kind == "train" and store.done(node) and work(node, task):
            rate = store.read_json(node, "timing.json")["seconds"] / work(node, task)
            seconds.setdefault(node.spec["t"], []).append(rate)
    trainings = [node for node in left if node.kind == "train" and work(node, task)]
    if not trainings:
        return "no training left"
    if any(node.spec["t"] not in seconds for node in trainings):
        return f"for the time it takes: compatbench doctor --protocol {task.protocol.id}"
    total = sum(work(n, task) * sum(seconds[n.spec["t"]]) / len(seconds[n.spec["t"]]) for n in trainings)
    return f"about {total / 60:.0f} minutes of training, as measured on the cached nodes"
