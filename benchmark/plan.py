"""A protocol, a method and a seed become a graph of nodes: train, embed, means, score. No node is ever computed twice.

A node's id is a hash of what decides its outcome: its settings, the data's fingerprint, the code of its method, the engine's
revision and the ids of its inputs. Old releases, oracles, old embeddings and class means therefore coincide for all methods.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmark import catalog
from benchmark.errors import UserError
from benchmark.method import OLD, Method, Need
from benchmark.protocol import Protocol, digest, to_json

# Raised when a change of the engine changes results: method.py, task.py, images.py, heads.py, backbones.py, retrieval.py, and
# what maps between releases are made of: bridge.py, adapters/, fusion.py. Ids know the code of methods alone.
REVISION = 1
Mode = Literal["chain", "pairwise"]


@dataclass(frozen=True)
class Node:
    """One unit of work, computed at most once."""

    kind: Literal["train", "frozen", "fit", "embed", "means", "score", "backfill"]
    label: str  # for people
    spec: Mapping[str, Any]  # JSON data
    inputs: Mapping[str, Node] = field(default_factory=dict)

    @functools.cached_property
    def id(self) -> str:
        parts = {name: node.id for name, node in self.inputs.items()}
        return digest([REVISION, self.kind, self.spec, parts])[:20]

    def walk(self) -> Iterator[Node]:
        """Inputs before the nodes that need them; nodes may repeat."""
        for node in self.inputs.values():
            yield from node.walk()
        yield self


@dataclass(frozen=True)
class MethodRun:
    """A method with its full hyperparameters under the name its row carries."""

    name: str
    cls: type[Method]
    hyperparameters: Mapping[str, Any]
    settings: Literal["paper", "tuned", "custom"]  # "paper": the method's own defaults, or a variant that it names
    tuning_images: int = 0  # what choosing the settings has cost

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any] | None = None) -> MethodRun:
        method, default = catalog.method(name)
        _, hyperparameters = catalog.method(name, given)
        shown = name if name in catalog.names("method") + catalog.names("two-sided method") else method.__name__
        return cls(shown, method, hyperparameters, "paper" if hyperparameters == default else "custom")


@dataclass(frozen=True)
class Plan:
    """All nodes of one (protocol, method, seed)."""

    protocol: Protocol
    method: MethodRun
    seed: int
    mode: Mode
    split: str
    releases: tuple[Node, ...]  # train or frozen, by release
    bounds: tuple[Node, ...]  # the same of independent training: the oracles
    cells: Mapping[tuple[int, int], Node | None]  # (t, k) -> score; None = undefined (unequal dims without a link)
    bound_cells: Mapping[tuple[int, int], Node | None]

    @functools.cached_property
    def nodes(self) -> list[Node]:
        """Every node once, inputs first."""
        ends = [node for cells in (self.bound_cells, self.cells) for node in cells.values() if node is not None]
        unique = {node.id: node for end in (*self.bounds, *self.releases, *ends) for node in end.walk()}
        return list(unique.values())


def build(
    protocol: Protocol, method: MethodRun, seed: int, fingerprint: str, mode: Mode = "chain", split: str = "test"
) -> Plan:
    """Lay out the work. `fingerprint` is the data's; nothing is read or computed here."""
    return _Builder(protocol, seed, fingerprint, mode, split).plan(method)


class _Builder:
    def __init__(self, protocol: Protocol, seed: int, fingerprint: str, mode: Mode, split: str):
        self.protocol, self.seed, self.fingerprint, self.mode, self.split = protocol, seed, fingerprint, mode, split
        self.independent = MethodRun.of("Independent")
        self.sides: tuple[str, ...] = catalog.load("task", protocol.task).sides
        self.made: dict[tuple[str, int], Node] = {}

    def plan(self, method: MethodRun) -> Plan:
        plain = (
            method.cls.loss is Method.loss and not method.cls.two_sided
        )  # trains by the task's own loss, whatever it is
        if not plain and method.cls.two_sided != bool(self.sides):
            what = "images and texts" if method.cls.two_sided else "images alone"
            raise UserError(f"{method.name} is a method for {what}, which {self.protocol.task} is no task of")
        count = len(self.protocol.releases)
        own = tuple(self.release(method, t) for t in range(count))
        bounds = tuple(self.release(self.independent, t) for t in range(count))
        older = bounds if self.mode == "pairwise" else own  # the releases that filled the galleries before
        pairs = [(t, k) for t in range(count) for k in range(t + 1)]
        cells = {(t, k): self.cell(method, own, own if k == t else older, t, k) for t, k in pairs}
        bound_cells = {(t, k): self.cell(self.independent, bounds, bounds, t, k) for t, k in pairs}
        return Plan(self.protocol, method, self.seed, self.mode, self.split, own, bounds, cells, bound_cells)

    def release(self, method: MethodRun, t: int) -> Node:
        """The node that yields release t of `method`."""
        if method.cls.keeps_releases(**method.hyperparameters) or (t == 0 and not method.cls.trains_first_release):
            method = self.independent
        key = (digest([method.name, method.hyperparameters]), t)
        if key not in self.made:
            self.made[key] = self.trained(method, t)
        return self.made[key]

    def step(self, method: MethodRun, t: int, k: int) -> Node:
        """The node that yields the link of `method` from release t to release k."""
        if not method.cls.keeps_releases(**method.hyperparameters):
            return self.release(method, t)
        key = (digest([method.name, method.hyperparameters, k]), t)
        if key not in self.made:
            self.made[key] = self.trained(method, t, k)
        return self.made[key]

    def trained(self, method: MethodRun, t: int, k: int | None = None) -> Node:
        """Release t of `method`; with `k` a link alone, from release t to release k."""
        protocol, old = self.protocol, self.old(method, t, k)
        spec = self.rebuild(method, t, old) | ({} if k is None else {"k": k})
        if t == 0 and method.cls is self.independent.cls and self.seed in protocol.frozen:
            spec |= {"sha256": protocol.frozen[self.seed], "protocol": protocol.id, "seed": self.seed}
            return Node("frozen", f"release 0 ({protocol.releases[0].name}), frozen, seed {self.seed}", spec)
        inputs = {}
        for name, need in method.cls.requires(t, **method.hyperparameters).items():
            source = self.source(method, need, t, k)
            spec["needs"][name] = [need.kind, source.spec["dim"]]
            inputs[name] = self.need(need, source, t)
        spec |= {"seed": self.seed, "fingerprint": self.fingerprint, "source": catalog.source_digest(method.cls)}
        if k is not None:
            kind: Literal["fit", "train"] = "fit" if method.cls.closed_form else "train"
            return Node(kind, f"{kind} {method.name} between releases {k} and {t}", spec, inputs)
        return Node("train", f"train {method.name} release {t} ({protocol.releases[t].name})", spec, inputs)

    def rebuild(self, method: MethodRun, t: int, old: Node | None) -> dict[str, Any]:
        """What it takes to build the network again and load its weights."""
        release, old_dim = self.protocol.releases[t], old.spec["dim"] if old else None
        return {
            "method": f"{method.cls.__module__}.{method.cls.__qualname__}",
            "hyperparameters": to_json(method.hyperparameters),
            "t": t,
            "release": to_json(release),
            "head": to_json(self.protocol.head),
            "task": [self.protocol.task, to_json(self.protocol.task_args)],
            "similarity": self.protocol.similarity,
            "old_dim": old_dim,
            "dim": method.cls.stored_dim(release, old_dim, **method.hyperparameters),
            "needs": {},
        }

    def old(self, method: MethodRun, t: int, k: int | None = None) -> Node | None:
        if t == 0:
            return None
        return self.release(self.independent if self.mode == "pairwise" else method, t - 1 if k is None else k)

    def source(self, method: MethodRun, need: Need, t: int, k: int | None = None) -> Node:
        if need.source == OLD:
            old = self.old(method, t, k)
            if old is None:
                raise UserError(f"{method.name} asks for an old release at release 0; `requires` must not for t = 0")
            return old
        return self.release(
            MethodRun.of(need.source, need.hyperparameters), t if need.release is None else need.release
        )

    def need(self, need: Need, source: Node, t: int) -> Node:
        if need.kind == "encoder":
            return source
        embedded = self.embed(source, f"train:{t}" + (f":{need.side}" if need.side else ""))
        if need.kind == "embeddings":
            return embedded
        return Node("means", f"class means of train:{t}, {source.label}", {"t": t}, {"embeddings": embedded})

    def embed(self, release: Node, items: str) -> Node:
        spec = {"items": items, "fingerprint": self.fingerprint}
        return Node("embed", f"embed {items}, {release.label}", spec, {"encoder": release})

    def cell(
        self, method: MethodRun, queries: tuple[Node, ...], galleries: tuple[Node, ...], t: int, k: int
    ) -> Node | None:
        cls, settings, stored = method.cls, method.hyperparameters, galleries[k].spec["dim"]
        hops = cls.steps(t, k, **settings)
        dims = [((queries if a == t else galleries)[a].spec["dim"], galleries[b].spec["dim"]) for a, b in hops]
        if not all(cls.serves(new, old) for new, old in dims):
            return None  # unequal dims without a declared link
        if len(hops) > 1 and self.mode == "pairwise" and not cls.keeps_releases(**settings):
            return None  # each hop would start from a release that the hop before it does not lead to
        if t == k and cls.keeps_releases(**settings):
            return self.cell(self.independent, queries, galleries, t, k)
        links = [self.step(method, a, b) for a, b in hops]
        inputs = {"link" if not i else f"link{i}": node for i, node in enumerate(links)}
        read = {
            "query": (queries, cls.query_views(t, k, **settings)),
            "gallery": (galleries, cls.gallery_views(t, k, **settings)),
        }
        for end, (releases, views) in read.items():
            for r, view in views:
                encoder = self.viewed(method, releases, r, view, t)
                for side in self.sides or (end,):  # two-sided items are on both ends, one direction each
                    inputs[f"{end}/{r}/{side if self.sides else view}"] = self.embed(encoder, f"{self.split}:{side}")
        spec = {"t": t, "k": k, "split": self.split, "similarity": self.protocol.similarity, "stored": stored}
        return Node("score", f"score queries of {queries[t].label}, gallery of {galleries[k].label}", spec, inputs)

    def viewed(self, method: MethodRun, releases: tuple[Node, ...], r: int, view: str, t: int) -> Node:
        """The encoder behind a view: of release r, or the one that the method's needs name like the view."""
        if view == "main":
            return releases[r]
        return self.source(method, method.cls.requires(t, **method.hyperparameters)[view], t)
