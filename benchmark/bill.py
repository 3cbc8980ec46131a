"""What a row costs if it is run alone: images, parameters, bytes, multiply-adds, and its maps between releases."""

from __future__ import annotations

from collections.abc import Mapping

from benchmark import catalog, training
from benchmark.bridge import Bridge
from benchmark.files import sha256_file
from benchmark.plan import Node, Plan
from benchmark.record import Cost, LinkInfo
from benchmark.store import Store
from benchmark.task import Task
from benchmark.training import StepSize

EMBEDDED = ("main", "image", "text")  # views that are a release's own embeddings; others are side information


def row_nodes(plan: Plan) -> list[Node]:
    """Every node that this row needs if it is run alone: its releases, their inputs, its cells; not the bounds."""
    ends = [*plan.releases, *(node for node in plan.cells.values() if node is not None)]
    return list({node.id: node for end in ends for node in end.walk()}.values())


def steps(plan: Plan) -> list[Node]:
    """The nodes that hold a map between two releases, by release; none but for a `Bridge`.

    Such a node is the map alone, or a new release that is trained together with its map.
    """
    found = {node.id: node for node in row_nodes(plan) if node.kind in ("train", "fit") and _bridge(node)}
    return sorted(found.values(), key=lambda node: (node.spec["t"], leads_to(node)))


def _bridge(node: Node) -> bool:
    return issubclass(catalog.load("method", node.spec["method"]), Bridge)


def leads_to(step: Node) -> int:
    """The older release that a step leads to."""
    return step.spec.get("k", step.spec["t"] - 1)


def link_info(node: Node, task: Task, store: Store) -> LinkInfo:
    """A step as the record keeps it."""
    facts, size = store.read_json(node, "train.json"), training.step_size(node, task)
    terms = list(facts["history"][0]) if facts["history"] else []
    return LinkInfo(
        release=node.spec["t"],
        stored=leads_to(node),
        parameters=size.parameters,
        multiply_adds={str(side): count for side, count in size.multiply_adds.items()},
        pairs=facts.get("pairs"),
        fusion=facts.get("fusion"),
        recipe=facts.get("recipe"),
        losses={term: [epoch[term] for epoch in facts["history"]] for term in terms},
        weights_sha256=sha256_file(store.folder(node) / "link.safetensors"),
    )


def cost(plan: Plan, task: Task, store: Store) -> Cost:
    """The bill; what each number means stands in `Cost`."""
    facts = {n.id: store.read_json(n, "train.json") for n in row_nodes(plan) if n.kind in ("train", "frozen")}
    beside = max(([] if cell is None else side_encoders(cell) for cell in plan.cells.values()), key=_dims)
    networks = {node.id: node for node in (*plan.releases, *map(own, plan.releases), *beside)}
    size = {id: training.size(node, task) for id, node in networks.items()}
    found = {node.id: (node, training.step_size(node, task)) for node in steps(plan)}

    method, releases = plan.method, range(len(plan.releases))
    added = [[step for node, step in found.values() if node.spec["t"] == t] for t in releases]
    trained = [size[own(node).id].trained_parameters for node in plan.releases]
    released = [size[node.id].released_parameters for node in plan.releases]
    ingested = [size[node.id].multiply_adds for node in plan.releases]
    for t in releases:
        trained[t] += sum(step.trained_parameters for step in added[t])
        released[t] += sum(step.parameters for step in added[t])
    for node in beside:
        trained[node.spec["t"]] += size[node.id].trained_parameters
        released = [count + size[node.id].released_parameters for count in released]
        ingested = [count + size[node.id].multiply_adds for count in ingested]

    views = {(t, k): method.cls.query_views(t, k, **method.hyperparameters) for t, k in plan.cells}
    queries = []
    for t in releases:
        encoders = [{r for r, _ in views[t, k]} | {t} for k in range(t + 1)]
        cells = [sum(size[plan.releases[r].id].multiply_adds for r in read) for read in encoders]
        queries.append(max(count + mapping(plan, found, t, k) for k, count in enumerate(cells)))
    moves = sum(  # updates that move every stored item
        "gallery" in step.multiply_adds for node, step in found.values() if node.spec["t"] == leads_to(node) + 1
    )
    moved = [max((step.multiply_adds.get("gallery", 0) for step in added[t]), default=0) for t in releases]
    kept = [original_dims(plan, t) if moves else 0 for t in releases]
    return Cost(
        training_images=sum(one["images_seen"] for one in facts.values()),
        teacher_forwards=sum(one["teacher_forwards"] for one in facts.values()),
        trained_parameters=trained,
        released_parameters=released,
        bytes_per_item=[4 * (node.spec["dim"] + kept[t] + _dims(beside)) for t, node in enumerate(plan.releases)],
        query_encoders=max(len({release for release, _ in view}) for view in views.values()),
        query_multiply_adds=queries,
        items_reembedded=0,
        vectors_rewritten=moves * len(task.items(plan.split, "gallery")[0]),
        tuning_images=method.tuning_images,
        gallery_multiply_adds=moved if moves else [],
        ingest_multiply_adds=ingested if beside else [],
    )


def own(release: Node) -> Node:
    """The node that trained a release's encoder: of one that is trained with its step, the independent release it starts from."""
    if release.kind == "train" and _bridge(release):
        return next(n for n in release.inputs.values() if n.kind == "train" and n.spec["t"] == release.spec["t"])
    return release


def mapping(plan: Plan, found: Mapping[str, tuple[Node, StepSize]], t: int, k: int) -> int:
    """Multiply-adds of the steps that a query of release t passes on its way to items of release k."""
    cell = plan.cells[t, k]
    if cell is None or t == k:
        return 0
    return sum(found[n.id][1].multiply_adds.get("query", 0) for n in cell.inputs.values() if n.id in found)


def original_dims(plan: Plan, t: int) -> int:
    """Numbers of the original embedding that an item of an older release keeps beside its moved one, at most.

    The next update reads it where its map is direct; in a chain it moves what the last one left.
    """
    method, after = plan.method, t + 1
    kept = [k for k in range(t) if (after, k) in method.cls.steps(after, k, **method.hyperparameters)]
    return max((plan.releases[k].spec["dim"] for k in kept), default=0)


def side_encoders(cell: Node) -> list[Node]:
    """The encoders, none of them a release, whose embeddings a cell reads beside the items' own: side information."""
    main = {node.inputs["encoder"].id for name, node in cell.inputs.items() if name.rpartition("/")[2] in EMBEDDED}
    stored = [node.inputs["encoder"] for name, node in cell.inputs.items() if name.startswith("gallery/")]
    return [encoder for encoder in stored if encoder.id not in main]


def _dims(encoders: list[Node]) -> int:
    return sum(encoder.spec["dim"] for encoder in encoders)
