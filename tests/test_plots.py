"""What people see is what the records say: cells, marks, means, and which records make one row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from rich.console import Console, RenderableType

from benchmark import plots, protocol, record
from benchmark.errors import UserError
from benchmark.protocol import digest
from benchmark.record import Record

METRIC = "cmc@1"
OWN: list[list] = [[0.5, None, None], [0.625, 0.75, None], [0.25, None, 0.875]]  # 2 -> 0 fails, 2 -> 1 is undefined
INDEPENDENT: list[list] = [[0.5, None, None], [0.0625, 0.7, None], [0.03, 0.04, 0.9]]


def made(
    own: list | None = None,
    name: str = "BCT",
    seed: int = 0,
    method: dict[str, Any] | None = None,
    of_protocol: dict[str, Any] | None = None,
    releases: int = 3,
) -> Record:
    """A committed record with matrices that are easily read."""
    data = record.load(protocol.LEADERBOARDS / "digits@1" / "BCT" / "seed0.json").model_dump()
    data["method"] |= {"name": name} | (method or {})
    data["protocol"] |= of_protocol or {}
    data["seed"] = seed
    data["releases"] = data["releases"][:releases]
    data["timing"]["training_seconds"] = 1234.0
    for stratum in data["matrices"][METRIC]:
        data["matrices"][METRIC][stratum] = [row[:releases] for row in (own or OWN)[:releases]]
        data["independent"][METRIC][stratum] = [row[:releases] for row in INDEPENDENT[:releases]]
    return Record.model_validate(data)


def cells(axis: Axes) -> dict[tuple[int, int], str]:
    """(t, k) -> text"""
    return {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axis.texts}


def panels(figure: Figure) -> list[Axes]:
    return [axis for axis in figure.axes if axis.get_title()]


def hatched(axis: Axes) -> list[Patch]:
    return [patch for patch in axis.patches if patch.get_hatch()]


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Set the width that the terminal seems to have."""

    def set_width(width: int) -> None:
        monkeypatch.setattr(plots, "get_console", lambda: Console(width=width))

    yield set_width


def shown(renderable: RenderableType, width: int) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


# ------------------------------------------------------------------------------------------------------- pictures


def test_heat_map_says_every_cell_beside_independent_training() -> None:
    figure = plots.heatmap(made(), METRIC)
    independent, own = panels(figure)
    assert (independent.get_title(), own.get_title()) == ("independent training", "BCT")
    assert cells(own) == {
        (0, 0): "50.0", (1, 0): "62.5 ✓", (1, 1): "75.0", (2, 0): "25.0 ✗", (2, 1): "n/a", (2, 2): "87.5",
    }  # fmt: skip
    assert cells(independent)[2, 1] == "4.0 ✗"
    assert len(hatched(own)) == 1 and not hatched(independent)
    names = [release.name for release in made().releases]
    assert [label.get_text() for label in independent.get_yticklabels()] == names
    assert [label.get_text() for label in own.get_xticklabels()] == names
    title = figure.get_suptitle()
    assert all(part in title for part in ("digits@1", "seed 0", METRIC, "queries: all"))


def test_one_value_has_one_colour_in_all_panels_and_higher_is_darker() -> None:
    independent, own = panels(plots.heatmap(made(), METRIC))

    def lightness(axis: Axes, t: int, k: int) -> float:
        (patch,) = [p for p in axis.patches if p.get_fill() and p.get_xy() == (k - 0.5, t - 0.5)]  # type: ignore[attr-defined]
        red, green, blue = to_rgb(patch.get_facecolor())
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert lightness(own, 0, 0) == lightness(independent, 0, 0)
    assert lightness(independent, 2, 2) < lightness(own, 2, 2) < lightness(own, 1, 1) < lightness(own, 2, 0)


def test_compatible_cells_have_a_border_too() -> None:
    _, own = panels(plots.heatmap(made(), METRIC))
    (border,) = [patch for patch in own.patches if not patch.get_fill()]
    assert border.get_xy() == (0 - 0.45, 1 - 0.45)  # type: ignore[attr-defined]


def test_independent_training_alone_is_one_panel() -> None:
    assert len(panels(plots.heatmap(made(INDEPENDENT, "Independent"), METRIC))) == 1


def test_pairwise_cells_are_held_against_the_independent_old_release() -> None:
    own = [[0.7, None, None], [0.6, 0.8, None], [0.6, 0.72, 0.9]]  # below 0.7 and 0.8, above 0.5 and 0.7
    chain, pairwise = (panels(plots.heatmap(made(own, method={"mode": m}), METRIC))[1] for m in ("chain", "pairwise"))
    assert [cells(chain)[at][-1] for at in ((1, 0), (2, 0), (2, 1))] == ["✗", "✗", "✗"]
    assert [cells(pairwise)[at][-1] for at in ((1, 0), (2, 0), (2, 1))] == ["✓", "✓", "✓"]


def test_one_panel_a_method_is_the_mean_over_its_seeds() -> None:
    second = [[0.5, None, None], [0.375, 0.75, None], [0.25, None, 0.875]]
    records = [made(), made(second, seed=1), made(INDEPENDENT, "Independent"), made(INDEPENDENT, "Independent", 1)]
    figure = plots.matrices_figure(records, METRIC)
    assert [axis.get_title() for axis in panels(figure)] == ["Independent", "BCT"]
    assert cells(panels(figure)[1])[1, 0] == "50.0 ✗"  # a tie is not better
    assert "mean of 2 seeds" in figure.get_suptitle()


def test_methods_with_unequal_numbers_of_seeds_say_so() -> None:
    figure = plots.matrices_figure([made(), made(seed=1), made(name="BT2")], METRIC)
    assert [axis.get_title() for axis in panels(figure)] == ["BCT (n = 2)", "BT2 (n = 1)"]


@pytest.mark.parametrize("count", [1, 4, 5])
def test_every_column_and_row_of_panels_names_its_releases(count: int) -> None:
    shown = panels(plots.matrices_figure([made(name=f"M{i}") for i in range(count)], METRIC))
    assert len(shown) == count
    below = [axis for axis in shown if any(label.get_text() for label in axis.get_xticklabels())]
    left = [axis for axis in shown if any(label.get_text() for label in axis.get_yticklabels())]
    assert (len(below), len(left)) == {1: (1, 1), 4: (2, 2), 5: (3, 2)}[count]


def test_a_single_release_and_an_all_undefined_matrix_can_be_drawn(tmp_path: Path) -> None:
    plots.save(plots.heatmap(made(releases=1), METRIC), tmp_path / "one.png")
    empty = [[None] * 3 for _ in range(3)]
    plots.save(plots.matrices_figure([made(empty)], METRIC), tmp_path / "none.png")


def test_the_same_figure_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plots.save(plots.heatmap(made(), METRIC), tmp_path / "new folder" / name)
    first, second = sorted((tmp_path / "new folder").iterdir())
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as image:
        assert image.width > 800 and not {"Software", "Creation Time"} & set(image.info)


# ------------------------------------------------------------------------------------------------------- terminal


def test_terminal_shows_numbers_and_marks_without_colour() -> None:
    one = made()
    text = shown(plots.terminal(one, METRIC), 80)
    for part in ("50.0", "62.5 ✓", "25.0 ✗", "n/a", "87.5", *(release.name for release in one.releases)):
        assert text.count(part) >= 4  # once a stratum
    assert [text.index(f"queries: {s}") for s in record.ordered(one.queries)] == sorted(
        text.index(f"queries: {s}") for s in one.queries
    )
    only = shown(plots.terminal(one, METRIC, ["never-seen"]), 80)
    assert only.count("62.5 ✓") == 1 and f"never-seen ({one.queries['never-seen']:,})" in only


def test_summary_fits_eighty_columns_and_says_more_in_wide_terminals(columns: Any) -> None:
    own = [[0.5, None, None], [0.6, 0.75, None], [0.55, 0.7, 0.87]]
    records = [made(own), made(INDEPENDENT, "Independent")]
    columns(80)
    text = shown(plots.summary_table(records, METRIC), 80)
    assert "…" not in text and "train s" not in text
    row = next(line for line in text.splitlines() if line.split()[:1] == ["BCT"]).split()
    # gains: (60 - 50) / (70 - 50), (55 - 50) / (90 - 50), (70 - 75) / (90 - 75)
    gain = (10 / 20 + 5 / 40 - 5 / 15) / 3
    assert row[1:4] == ["50.0", "55.0", "87.0"] and row[4:8] == ["67", "66.2", f"{100 * gain:+.0f}", "-3.0"]
    columns(120)
    text = shown(plots.summary_table(records, METRIC), 120)
    assert "…" not in text and "AC95" in text and "train s" in text and "1,234" in text
    row = next(line for line in text.splitlines() if line.split()[:1] == ["BCT"]).split()
    assert row[4] == "90.0"  # the oracle


def test_long_row_names_are_whole_in_eighty_columns(columns: Any) -> None:
    columns(80)
    records = [
        made(INDEPENDENT, "Independent"),
        made(name="BCT-extra", method={"mode": "pairwise", "settings": "custom"}),
    ]
    text = shown(plots.summary_table(records, METRIC), 80)
    assert "…" not in text and "pairwise" in text and "-extra+" in text.replace("\n", "")


def test_summary_counts_seeds_and_leaves_out_what_several_seeds_do_not_have(columns: Any) -> None:
    columns(120)
    text = shown(plots.summary_table([made(), made(seed=1), made(name="OCA")], METRIC), 120)
    rows = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line.split()[:1] in (["BCT"], ["OCA"])}
    assert rows == {"BCT": "2", "OCA": "1"} and "AC95" not in text


def test_reconstructions_are_marked_in_the_summary(columns: Any) -> None:
    columns(120)
    records = [made(), made(name="RQT-MCL", method={"reference": "benchmark.methods.rqt.RQT"})]
    text = shown(
        plots.summary_table([*records, made(name="mine", method={"reference": "my_method.Mine"})], METRIC), 120
    )
    assert {line.split()[0] for line in text.splitlines() if line.split()} >= {"BCT", "RQT-MCL†", "mine"}
    assert "† reconstruction" in text and "†" not in shown(plots.summary_table(records[:1], METRIC), 120)


# ------------------------------------------------------------------------------------------------ what makes one row


def test_only_equal_runs_are_averaged() -> None:
    weight = {"weight": 3.0}
    runs = [
        made(),
        made(seed=1),
        made(method={"settings": "custom", "hyperparameters": weight}),
        made(method={"mode": "pairwise"}),
        made(of_protocol={"split": "validation"}),
        made(of_protocol={"overrides": ["releases.1.recipe.epochs=1"], "sha256": "abcdef0123"}),
    ]
    found = {name: len(group) for name, group in plots.by_method(runs).items()}
    assert found == {
        "BCT": 2,
        f"BCT+{digest(weight)[:6]}": 1,
        "BCT (pairwise)": 1,
        "BCT (validation)": 1,
        "BCT (off-protocol abcdef)": 1,
    }


def test_records_of_two_protocols_make_no_table() -> None:
    records = [made(), made(of_protocol={"id": "cifar100-lite@1"})]
    for show in (plots.summary_table, plots.matrices_figure):
        with pytest.raises(UserError, match=r"cifar100-lite@1.*digits@1"):
            show(records, METRIC)
