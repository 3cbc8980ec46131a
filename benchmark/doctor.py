"""Is this machine ready: packages, data, frozen releases, and how long a run will take. Says what to do about the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table
from rich.text import Text

from benchmark import catalog, steptime
from benchmark import protocol as protocols
from benchmark.errors import UserError
from benchmark.files import sha256_file
from benchmark.protocol import LEADERBOARDS, Protocol

if TYPE_CHECKING:
    from benchmark.task import Task

MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}  # uploaded on 2026-04-30, Lightning-AI/pytorch-lightning issue 21691
ROOM = 2 * 2**30  # bytes of free disk and of memory below which we warn
SMALL = 64**2  # pixels of an image whose steps are timed on a CPU without being asked for


@dataclass(frozen=True)
class Check:
    """One finding. "wrong" stops runs, a "warning" does not or only those of one protocol; `remedy` is the way out."""

    topic: str
    status: Literal["ok", "warning", "wrong"]
    text: str
    remedy: str = ""


def report(protocol_names: Sequence[str] | None = None, data: Path | None = None) -> list[Check]:
    """Check everything, in the order of a run: machine, packages, modules, then each protocol (None = all shipped).

    No data are downloaded. Takes seconds for the imports, and for each protocol whose data are there the time
    to read them and about two seconds a release; where a step on a CPU would take longer, only if the protocol is named.
    """
    checks = [*machine(), *packages(), *modules()]
    usable = ok(checks)
    if usable:
        checks += libraries()
        usable = ok(checks)
    for name in protocols.shipped() if protocol_names is None else protocol_names:
        checks += protocol(name, data, usable, asked=protocol_names is not None)
    return checks


def ok(checks: Sequence[Check]) -> bool:
    """Whether nothing is wrong; warnings (data that are merely missing) are none."""
    return all(check.status != "wrong" for check in checks)


def render(checks: Sequence[Check]) -> Table:
    """The findings for rich's `print`, each with its way out."""
    marks = {"ok": ("ok", "green"), "warning": ("note", "yellow"), "wrong": ("WRONG", "bold red")}
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in ({"no_wrap": True}, {"no_wrap": True}, {"overflow": "fold"}):
        table.add_column(**column)
    topic = None
    for check in checks:
        text = Text(check.text)  # a Text, since paths may hold brackets
        if check.remedy:
            text.append(f"\n-> {check.remedy}", style="bold")
        table.add_row(Text(check.topic if check.topic != topic else "", style="bold"), Text(*marks[check.status]), text)
        topic = check.topic
    return table


# ------------------------------------------------------------------------------------------------------------- machine


def machine() -> Iterator[Check]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    limit = f", OMP_NUM_THREADS={threads}" if threads else ""
    load = os.getloadavg()[0]
    yield Check("machine", "ok", f"{_processor()}, {usable} of {os.cpu_count()} cores usable{limit}")
    if load > usable / 2:
        yield Check("machine", "warning", f"load {load:.1f}: other work is running", "times measured now are too long")
    total, free = _memory()
    low = 0 < free < ROOM
    memory = f"memory {_gib(total)}, {_gib(free)} free"
    yield Check("machine", "warning" if low else "ok", memory, "close other programs" if low else "")
    disk = shutil.disk_usage(Path.cwd()).free
    low = disk < ROOM
    yield Check(
        "machine",
        "warning" if low else "ok",
        f"disk {_gib(disk)} free under {Path.cwd()}",
        "free some, or put results elsewhere with --runs" if low else "",
    )


def _processor() -> str:
    """The CPU's name. `results.processor` knows it too, but needs torch, which may be what is broken."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> tuple[int, int]:
    """Bytes (in all, free), within a container's limit where there is one; 0 where the system does not tell."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):
        return 0, 0
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
        return min(total, limit), min(free, limit - used)
    except (OSError, ValueError):  # "max", or no such group
        return total, free


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count else "unknown"


# ------------------------------------------------------------------------------------------------------------ packages


def packages() -> Iterator[Check]:
    """Python and the installed versions, against pyproject.toml. Imports none of them."""
    from packaging.requirements import Requirement

    try:
        project = tomllib.loads((catalog.ROOT / "pyproject.toml").read_text())["project"]
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        yield Check(
            "packages", "wrong", f"{catalog.ROOT}/pyproject.toml cannot be read", "restore it from the repository"
        )
        return
    python, wanted = platform.python_version(), project["requires-python"]
    if python in Requirement(f"python{wanted}").specifier:
        yield Check("packages", "ok", f"Python {python} in {sys.prefix}")
    else:
        remedy = "remove .venv and run `make setup PYTHON=/path/to/another/python3`"
        yield Check("packages", "wrong", f"Python {python}, needed {wanted}", remedy)
    fine = []
    for line in project["dependencies"]:
        need = Requirement(line)
        if need.marker and not need.marker.evaluate():
            continue
        version = _installed(need.name)
        if version in MALICIOUS.get(need.name, ()):
            remedy = "remove it, run `make setup`, and renew every password and key that this machine held"
            yield Check(
                "packages", "wrong", f"{need.name} {version} is a MALICIOUS release; it was not imported", remedy
            )
        elif version is None:
            yield Check("packages", "wrong", f"{need.name} is not installed", "`make setup`")
        elif not need.specifier.contains(version, prereleases=True):
            yield Check("packages", "wrong", f"{need.name} {version}, needed {need.specifier}", "`make setup`")
        else:
            fine.append(f"{need.name} {version}")
    if fine:
        yield Check("packages", "ok", ", ".join(fine))


def _installed(name: str) -> str | None:
    for candidate in (name, "faiss-cpu") if name == "faiss-gpu" else (name,):  # either serves
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def modules() -> Iterator[Check]:
    """`benchmark`, `tasks` and `leaderboards` are common names: are they ours wherever Python looks first?"""
    for name in ("benchmark", "tasks", "leaderboards"):
        spec = PathFinder.find_spec(name) or importlib.util.find_spec(name)  # the path goes before editable installs
        found = (
            [Path(place).resolve() for place in (spec.submodule_search_locations or [spec.origin or "?"])]
            if spec
            else []
        )
        if found != [catalog.ROOT / name]:
            where = ", ".join(map(str, found)) or "nowhere"
            remedy = "run from another folder, or take that path out of PYTHONPATH"
            yield Check("modules", "wrong", f"'{name}' is found at {where}, not at {catalog.ROOT / name}", remedy)


def libraries() -> Iterator[Check]:
    """torch and torchvision load together; what they see of a GPU."""
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken binary raises anything
        yield Check(
            "packages", "wrong", f"torch cannot be imported: {_line(error)}", "remove .venv and run `make setup`"
        )
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        text = f"torchvision does not load beside torch {torch.__version__}: {_line(error)}"
        remedy = "remove .venv and run `make setup`"
        if "torchvision::nms" in str(error):
            text += "; they are not a pair, e.g. a CPU-only torch beside the registry's torchvision"
            remedy = "install both at once from one index: " + remedy
        yield Check("torch", "wrong", text, remedy)
        return
    if not torch.cuda.is_available():
        yield Check("torch", "ok", f"torch {torch.__version__} sees no GPU; everything runs on the CPU")
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        yield Check("torch", "ok", f"GPU {i}: {facts.name}, {_gib(facts.total_memory)}")


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# ----------------------------------------------------------------------------------------------------------- protocols


def protocol(name: str, data: Path | None, usable: bool = True, asked: bool = True) -> Iterator[Check]:
    """Definition, frozen releases, data and expected time of one protocol; the latter two if torch is `usable`.

    asked: whether a user named it, and so waits for steps on large images on a CPU.
    """
    try:
        found = protocols.load(name)
    except UserError as error:
        yield Check(name, "wrong", str(error))
        return
    yield from _frozen(found)
    if not usable:
        yield Check(found.id, "warning", "data not looked at", "mend the packages first")
        return
    try:
        absent = catalog.load("task", found.task).missing(data)
        if absent:
            yield Check(found.id, "warning", f"data missing: {absent}")
            return
        from benchmark import runner

        task = runner.open_task(found, data, runner.default_device())
    except UserError as error:
        yield Check(found.id, "wrong", str(error))
        return
    frozen = "as frozen" if found.fingerprint else "the protocol freezes no fingerprint"
    images = ", ".join(str(task.train_size(t)) for t in range(len(found.releases)))
    text = f"data found: {images} training images by release, {len(task.items('test', 'query')[0])} queries against "
    text += f"{len(task.items('test', 'gallery')[0])}; fingerprint {task.fingerprint[:12]} ({frozen})"
    yield Check(found.id, "ok", text)
    if not asked and task.device == "cpu" and steptime.pixels(task) > SMALL:
        remedy = f"compatbench doctor --protocol {found.id} times it, in minutes"
        yield Check(found.id, "ok", "large images and no GPU: training time not measured", remedy)
        return
    try:
        yield Check(found.id, "ok", _expected_time(task))
    except Exception as error:  # a network that does not fit the images raises anything
        yield Check(found.id, "wrong", f"training fails: {_line(error)}")


def _frozen(found: Protocol) -> Iterator[Check]:
    folder, good = LEADERBOARDS / found.id / "old", 0
    for seed, expected in found.frozen.items():
        path = folder / f"seed{seed}.safetensors"
        problem = ""
        if not path.is_file() or not path.with_suffix(".json").is_file():
            problem = "is missing, or the .json beside it"
        elif sha256_file(path) != expected:
            problem = "does not match its hash in the protocol"
        if problem:
            yield Check(found.id, "wrong", f"frozen old release {path} {problem}", "restore it from the repository")
        good += not problem
    if good:
        yield Check(found.id, "ok", f"{good} of {len(found.frozen)} frozen old releases as in the protocol")


def _expected_time(task: Task) -> str:
    """Training time of independent releases from timed steps. What comes out is no more than those steps, multiplied."""
    import torch

    from benchmark.plan import MethodRun, build

    seed = task.protocol.seeds[0]
    nodes = build(task.protocol, MethodRun.of("Independent"), seed, task.fingerprint).releases
    total, parts = 0.0, []
    for t, node in enumerate(nodes):
        if node.kind == "train":
            per_step, timed, steps, share = steptime.time_steps(node, task, steptime.SECONDS)
            total += per_step * steps
            part = f", on {share:.1%} of a batch" if share < 1 else ""
            parts.append(f"release {t} {_duration(per_step * steps)} ({timed} of {steps} steps timed{part})")
        else:
            parts.append(f"release {t} frozen")
    where = task.device if task.device != "cpu" else f"{torch.get_num_threads()} CPU threads"
    return (
        f"about {_duration(total)} to train a sequence of Independent, one seed, on {where}: {', '.join(parts)}. Methods "
        "that ask an old model take longer; embedding and scoring come on top"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
