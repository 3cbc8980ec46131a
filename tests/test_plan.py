"""What is shared is shared, what differs differs, and no arrow of the architecture points up."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark import catalog, plan, protocol

DIGITS = protocol.load("digits@1")
LITE = protocol.load("cifar100-lite@1")


def build(
    name: str,
    given: dict | None = None,
    seed: int = 0,
    mode: plan.Mode = "chain",
    definition: protocol.Protocol = DIGITS,
) -> plan.Plan:
    return plan.build(definition, plan.MethodRun.of(name, given), seed, "fingerprint", mode)


def ids(made: plan.Plan, kind: str | None = None) -> set[str]:
    return {node.id for node in made.nodes if kind in (None, node.kind)}


def test_inputs_come_before_the_nodes_that_need_them() -> None:
    seen: set[str] = set()
    for node in build("BT2").nodes:
        assert {source.id for source in node.inputs.values()} <= seen
        seen.add(node.id)


def test_two_methods_share_release_0_its_embeddings_class_means_and_all_bounds() -> None:
    bct, oca, bounds = build("BCT"), build("OCA"), build("Independent")
    shared = ids(bct) & ids(oca)
    assert ids(bounds) <= shared and bct.releases[0].id == oca.releases[0].id
    first_means = next(node for node in bct.nodes if node.kind == "means")  # of the shared release 0
    assert first_means.id in shared and first_means.inputs["embeddings"].id in shared
    own = {node.id for node in (*bct.releases[1:], *oca.releases[1:])}
    assert not own & shared and len(own) == 4


def test_bt2_takes_its_oracles_from_independent_training() -> None:
    made = build("BT2")
    for t in (1, 2):
        assert made.releases[t].inputs["oracle"].id == made.bounds[t].id


def test_another_hyperparameter_value_moves_only_its_own_nodes() -> None:
    a, b = build("BCT"), build("BCT", {"weight": 2.0})
    assert ids(build("BCT", {"weight": 1.0})) == ids(a)
    assert ids(build("Independent")) <= ids(a) & ids(b)
    assert not {node.id for node in a.releases[1:]} & {node.id for node in b.releases[1:]}


def test_another_seed_another_fingerprint_another_split_share_no_training() -> None:
    a = build("BCT")
    assert not ids(a, "train") & ids(build("BCT", seed=1), "train")
    assert not ids(a, "train") & ids(plan.build(DIGITS, a.method, 0, "other data"), "train")
    assert ids(a, "train") == ids(plan.build(DIGITS, a.method, 0, "fingerprint", split="validation"), "train")


def test_old_is_the_methods_own_release_in_a_chain_and_the_independent_one_in_pairs() -> None:
    chain, pairs = build("BT2"), build("BT2", mode="pairwise")
    assert chain.releases[2].inputs["old"].id == chain.releases[1].id
    assert pairs.releases[2].inputs["old"].id == pairs.bounds[1].id
    gallery = pairs.cells[2, 1]
    assert gallery is not None and gallery.inputs["gallery/1/main"].inputs["encoder"].id == pairs.bounds[1].id


def test_frozen_old_releases_are_not_trained() -> None:
    made = build("BCT", definition=LITE)
    assert made.releases[0].kind == "frozen" and made.releases[0].spec["sha256"] == LITE.frozen[0]


def test_seeds_of_different_uses_differ() -> None:
    uses = [("backbone",), ("head",), ("epoch", 0), ("epoch", 1)]
    seeds = {protocol.derive_seed(seed, t, *use) for seed in (0, 1) for t in (0, 1) for use in uses}
    assert len(seeds) == 16 and all(0 <= seed < 2**63 for seed in seeds)


# ------------------------------------------------------------------------------------------------------- arrows

ROOT = catalog.ROOT
LOW = {
    "protocol",
    "record",
    "compatibility",
    "statistics",
    "retrieval",
    "embeddings",
    "heads",
    "backbones",
    "images",
    "files",
}
HIGH = {"plan", "runner", "training", "store", "results", "console", "__main__", "sweep", "trials"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports from the project, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] in ("benchmark", "tasks", "leaderboards")}


def test_a_task_never_imports_a_method_nor_a_method_a_task() -> None:
    for path in (ROOT / "tasks").glob("*.py"):
        assert not [name for name in imports(path) if ".method" in name], path
    for path in (ROOT / "benchmark" / "methods").glob("*.py"):
        assert not [name for name in imports(path) if name.startswith("tasks")], path


def test_the_engine_imports_no_task_and_low_modules_nothing_above_them() -> None:
    for path in (ROOT / "benchmark").glob("**/*.py"):
        assert not [name for name in imports(path) if name.startswith("tasks")], path
        if path.stem in LOW | {"task", "method"}:
            up = {name.split(".")[1] for name in imports(path) if "." in name} & HIGH
            assert not up, (path, up)


@pytest.mark.parametrize(
    "module", ["protocol", "record", "compatibility", "statistics", "outputs", "files", "plots", "catalog"]
)
def test_records_and_tables_need_no_torch(module: str) -> None:
    code = f"import sys, benchmark.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_leaderboards_are_built_without_torch() -> None:
    code = "import sys, leaderboards.tables, leaderboards.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
