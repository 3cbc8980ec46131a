"""The reproduction table holds what was published and where, and of ours only what records give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from benchmark import catalog, protocol
from benchmark.errors import UserError
from benchmark.files import sha256_file
from leaderboards import reproduction
from tests import test_backfill_pages as backfilled

TABLE = reproduction.load()
PUBLISHED: dict[str, Any] = {
    "sources": {"readme": {"text": "a README", "evidence": "README"}},
    "settings": {
        "small": {
            "data": "d",
            "split": "s",
            "models": "m",
            "evaluation": "e",
            "protocol": "small@1",
            "tolerance": 1.5,
            "why": "w",
        }
    },
    "methods": [
        {
            "name": "BCT",
            "paper": "p",
            "results": [
                {"setting": "small", "source": "readme", "case": "old/old", "values": {"cmc@1": 25.0}},
                {"setting": "small", "source": "readme", "case": "new/old", "values": {"cmc@1": 50.0, "cmc@5": 90.5}},
                {"setting": "small", "source": "readme", "case": "new/new", "values": {"cmc@1": 81.6, "map": 7.0}},
                {"setting": "small", "source": "readme", "case": "AUC", "values": {"cmc@1": 50.0}},
            ],
        }
    ],
}


def written(folder: Path, data: Any) -> Path:
    path = folder / "reproduction.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def changed(**fields: Any) -> dict[str, Any]:
    """PUBLISHED with its second line changed; None takes a field away."""
    data = json.loads(json.dumps(PUBLISHED))
    line = data["methods"][0]["results"][1] | fields
    data["methods"][0]["results"][1] = {key: value for key, value in line.items() if value is not None}
    return data


def board(root: Path, id: str = "small@1") -> None:
    """Two seeds of BCT on four queries of two releases: hits by hand, cells old/old 1/4, new/old 4/8, new/new 6/8."""
    first = {  # rank of the first positive of each query, by seed
        "0/0": ([1, 3, 3, 3], [1, 9, 9, 9]),
        "1/0": ([1, 1, 1, 9], [1, 9, 9, 3]),
        "1/1": ([1, 1, 1, 2], [1, 1, 1, 2]),
    }
    data = json.loads((protocol.LEADERBOARDS / "digits@1" / "BCT" / "seed0.json").read_text())
    folder = root / "small@1" / "BCT"
    folder.mkdir(parents=True)
    (folder.parent / "protocol.yaml").write_text((protocol.LEADERBOARDS / "digits@1" / "protocol.yaml").read_text())
    for seed in (0, 1):
        arrays = {"labels": np.zeros(4, np.int32), "mask/all": np.ones(4, np.uint8)}
        cells: dict[str, dict[str, float]] = {"cmc@1": {}, "cmc@5": {}}
        for cell, ranks in first.items():
            arrays[f"first/{cell}"] = np.array(ranks[seed], np.int32)
            cells["cmc@1"][cell] = sum(rank <= 1 for rank in ranks[seed]) / 4
            cells["cmc@5"][cell] = sum(rank <= 5 for rank in ranks[seed]) / 4
        save_file(arrays, folder / f"seed{seed}.safetensors")
        data["matrices"] = {
            metric: {"all": [[of["0/0"], None], [of["1/0"], of["1/1"]]]} for metric, of in cells.items()
        }
        data |= {"seed": seed, "releases": data["releases"][:2], "protocol": data["protocol"] | {"id": id}}
        data["outputs"] = {f"seed{seed}.safetensors": sha256_file(folder / f"seed{seed}.safetensors")}
        (folder / f"seed{seed}.json").write_text(json.dumps(data))


# ------------------------------------------------------------------------------------------------------ the shipped data


def test_every_method_of_the_suite_is_accounted_for() -> None:
    methods = {method.name: method for method in TABLE.methods}
    assert methods.keys() >= set(catalog.entries("method")) | {"XBT"}
    for unread in ("OCA", "MixBCT", "NCCL", "CoReS"):  # papers of which no number could be read
        assert not methods[unread].results and methods[unread].sought
    for name in catalog.entries("method"):
        for result in methods[name].results:
            assert result.record in (None, *catalog.names("method")), result


def test_every_number_is_a_percentage_with_a_source_that_says_where_it_was_read() -> None:
    assert all(source.text and source.evidence in reproduction.EVIDENCE for source in TABLE.sources.values())
    results = [result for method in TABLE.methods for result in method.results]
    assert all(result.source in TABLE.sources and result.values for result in results)
    assert all(0 <= value <= 100 for result in results for value in result.values.values())
    assert {result.source for result in results} == TABLE.sources.keys()
    assert {result.setting for result in results} == TABLE.settings.keys()


def test_some_numbers_stand_as_printed() -> None:
    """Read again from the sources, independent of the file's layout."""
    printed = {
        ("BT2", "bt2-cifar", "new/old", ""): "38.7 64.6 27.7",
        ("BCT", "bt2-imagenet", "new/old", ""): "44.3 66.4 34.6",
        ("AdvBCT", "advbct-class", "new/old", ""): "77.16 54.82 12.05",
        ("FCT", "fct-imagenet", "new/old", "side information"): "65.1 82.7 44.0",
        ("XBT", "xbt-coco", "new/old", "ViT-H/14"): "30.33 51.28 59.97 15.82 32.79 41.84",
        ("LambdaOrthogonality", "lambda-vit", "B(new)/old", ""): "65.54 38.55",
    }
    found = {
        (method.name, one.setting, one.case, one.variant): " ".join(map(str, one.values.values()))
        for method in TABLE.methods
        for one in method.results
    }
    assert {line: found[line] for line in printed} == printed


def test_hocs_matrix_gives_its_own_summary() -> None:
    (hoc,) = (method for method in TABLE.methods if method.name == "HOC")
    rows = [[float(v) for v in r.values.values()] for r in hoc.results if r.case.startswith("query release")]
    assert [len(row) for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    cells = [value for row in rows for value in row]
    assert round(sum(cells) / len(cells), 2) == 68.90
    passed = sum(row[k] > rows[k][k] for t, row in enumerate(rows) for k in range(t))
    assert passed == 20  # of 21: AC 0.95


def test_where_no_record_is_nothing_of_ours_is_shown(tmp_path: Path) -> None:
    page = reproduction.render(TABLE, tmp_path)
    lines = [line for line in page.splitlines() if "not run |" in line]
    assert len(lines) == sum(len(method.results) for method in TABLE.methods)
    assert all("|  |  | not run |" in line for line in lines)
    assert "cifar100-bt2@1 (to be defined)" in page and "cifar100-fct224@1 (to be defined)" in page


def test_the_page_names_what_was_sought_and_every_source() -> None:
    page = reproduction.render(TABLE)
    for method in TABLE.methods:
        assert f"## {method.name}\n" in page and (method.sought or "") in page
    for source in TABLE.sources.values():
        assert source.text in page
    assert (
        page.count("No number of this method could be read.")
        == sum(not method.results for method in TABLE.methods)
        >= 4
    )


# --------------------------------------------------------------------------------------------------------- bad entries


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"source": None}, "source: field required"),
        ({"source": " "}, "source"),
        ({"source": "memory"}, "unknown source 'memory'"),
        ({"setting": "other"}, "unknown setting 'other'"),
        ({"values": {"cmc@1": 101}}, "less than or equal to 100"),
        ({"values": {"cmc@1": -0.5}}, "greater than or equal to 0"),
        ({"values": {}}, "values"),
        ({"ours": 50.0}, "ours"),
        ({"status": "done"}, "status"),
        ({"case": "old/old"}, "given twice"),
    ],
)
def test_a_bad_entry_is_refused(tmp_path: Path, fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        reproduction.load(written(tmp_path, changed(**fields)))


def test_a_method_without_numbers_says_what_was_sought(tmp_path: Path) -> None:
    data = json.loads(json.dumps(PUBLISHED))
    data["methods"].append({"name": "Lost", "paper": "p"})
    with pytest.raises(UserError, match="what was sought"):
        reproduction.load(written(tmp_path, data))


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "reproduction.yaml").write_text("sources: [")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        reproduction.load(tmp_path / "reproduction.yaml")


# ---------------------------------------------------------------------------------------------------------------- ours


@pytest.mark.parametrize("claim", ["reproduced", "partly", "not reproduced"])
def test_a_status_that_claims_without_records_is_refused(tmp_path: Path, claim: str) -> None:
    table = reproduction.load(written(tmp_path, changed(status=claim)))
    with pytest.raises(UserError, match=f"BCT, small, new/old: status '{claim}' is typed, .* small@1 give 'not run'"):
        reproduction.render(table, tmp_path)


def test_records_become_ours_gap_and_status(tmp_path: Path) -> None:
    board(tmp_path)
    page = reproduction.render(reproduction.load(written(tmp_path, PUBLISHED)), tmp_path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "(README)" in line]
    by_case = {line[1]: line for line in lines}
    assert by_case["old/old"][5:8] == ["25.0 (n = 2)", "+0.0", "reproduced"]
    assert by_case["new/old"][5:8] == ["50.0 / 62.5 (n = 2)", "+0.0 / -28.0", "partly"]  # 3 + 1 of 8; 3 + 2 of 8
    assert by_case["new/new"][5:8] == ["75.0 / – (n = 2)", "-6.6 / –", "not reproduced"]
    assert by_case["AUC"][5:8] == ["", "", "not run"]
    assert "1 reproduced, 1 partly, 1 not reproduced, 1 not run" in page


def test_areas_come_from_backfill_records_by_the_lines_order(tmp_path: Path) -> None:
    """Random starts at 20 %, the own order at 30 %, a point more for the second seed; both end at 50 %."""
    board(tmp_path)
    for seed in (0, 1):
        record = backfilled.record(seed, "Mapped", "small@1")  # whose row is not there, so nothing holds its ends
        (tmp_path / "small@1" / "Mapped").mkdir(exist_ok=True)
        record.save(tmp_path / "small@1" / "Mapped" / f"backfill-seed{seed}.json")
    data = json.loads(json.dumps(PUBLISHED))
    area = data["methods"][0]["results"].pop()
    data["methods"][0]["results"] += [
        area | {"order": order, "record": "Mapped"} for order in ("random", "own", "class means")
    ]
    page = reproduction.render(reproduction.load(written(tmp_path, data)), tmp_path)
    found = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if "AUC, order" in line]
    assert [line[2] for line in found] == ["AUC, order: random", "AUC, order: own", "AUC, order: class means"]
    assert [line[6] for line in found] == ["35.2 (n = 2)", "40.2 (n = 2)", ""]  # (20.5 + 50) / 2, (30.5 + 50) / 2


def test_a_pinned_status_must_be_what_the_records_give(tmp_path: Path) -> None:
    board(tmp_path)
    assert reproduction.render(reproduction.load(written(tmp_path, changed(status="partly"))), tmp_path)
    with pytest.raises(UserError, match=r"'reproduced' is typed, .* give 'partly'"):
        reproduction.render(reproduction.load(written(tmp_path, changed(status="reproduced"))), tmp_path)


def test_records_of_another_protocol_do_not_count(tmp_path: Path) -> None:
    board(tmp_path, id="other@1")
    with pytest.raises(UserError, match="small@1/BCT: records of other@1"):
        reproduction.render(reproduction.load(written(tmp_path, PUBLISHED)), tmp_path)
