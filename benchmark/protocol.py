"""What a benchmark fixes: the sequence of releases, their recipes, the data, the metric. Frozen, hashed, without torch.

A protocol is a YAML file, `leaderboards/<name>@<major>/protocol.yaml`. Its sha256 goes into every record, so a number can
always be traced to the exact definition it was measured under.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from benchmark.errors import UserError, unknown

LEADERBOARDS = Path(__file__).resolve().parent.parent / "leaderboards"
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Recipe:
    """How one release is trained. Schedules are shares of training, so they fit any number of epochs."""

    __pydantic_config__ = _STRICT

    epochs: int = 10
    batch_size: int = 128
    optimizer: Literal["adamw", "adam", "sgd", "heavyball"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    momentum: float = 0.9  # sgd: Nesterov's; heavyball: without look-ahead
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle"
    warmup: float = 0.25  # share of all steps
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    augment: tuple[str, ...] = ()  # e.g. "flip", "crop2" (shift by at most 2 px after padding)
    precision: Literal["32-true", "64-true", "bf16-mixed"] = "32-true"


@dataclass(frozen=True)
class Release:
    """One model version of the sequence."""

    __pydantic_config__ = _STRICT

    name: str
    backbone: str  # "convnet", "convvit" (benchmark/backbones.py) or "timm/<model>"
    dim: int  # numbers stored per item, before extra dims
    classes: int | float = 1.0  # training classes it sees: a count, or a share, of the protocol's class order
    samples: float = 1.0  # share of the training samples of each seen class
    backbone_args: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)


@dataclass(frozen=True)
class HeadSpec:
    """The task's classification head. `cosine`: normalised features and weights times `scale`; `linear`: neither; `unit`:
    normalised features, free weights, no scale (`norm_feature` in FCT's and BT2's code)."""

    __pydantic_config__ = _STRICT

    kind: Literal["cosine", "linear", "unit", "arcface", "cosface"] = "cosine"
    scale: float = 16.0
    margin: float = 0.5  # arcface (radians), cosface (cosine) only


@dataclass(frozen=True)
class Protocol:
    """A frozen experiment: same data, releases, seeds and metric for every method."""

    __pydantic_config__ = _STRICT

    name: str
    version: str  # "major.minor"; a new major is a new table
    description: str
    task: str
    releases: tuple[Release, ...]
    seeds: tuple[int, ...]
    primary_metric: str
    similarity: Literal["cosine", "l2"] = "cosine"
    head: HeadSpec = field(default_factory=HeadSpec)
    task_args: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None  # hash of item lists and labels, checked before any training
    frozen: Mapping[int, str] = field(default_factory=dict)  # seed -> sha256 of old/seed<seed>.safetensors (release 0)
    notes: str = ""

    @property
    def id(self) -> str:
        """`name@major`, the folder of its leaderboard."""
        return f"{self.name}@{self.version.split('.')[0]}"

    @property
    def sha256(self) -> str:
        """Hash of the definition: whatever decides a number, so wording (`description`, `notes`) stays out."""
        data = to_json(self)
        return digest({key: value for key, value in data.items() if key not in ("description", "notes")})

    def class_count(self, t: int, total: int) -> int:
        """How many of the `total` training classes release `t` sees."""
        wanted = self.releases[t].classes
        count = wanted if isinstance(wanted, int) else round(wanted * total)
        if not 1 < count <= total:
            raise UserError(f"release {t} of {self.id} asks for {wanted} classes; the task trains on {total}")
        return count


def to_json(value: Any) -> Any:
    """Dataclasses, tuples and mappings as plain JSON data with string keys."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def digest(value: Any) -> str:
    """sha256 of canonical JSON: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(to_json(value), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def derive_seed(seed: int, *use: Any) -> int:
    """A 63-bit seed for one use of randomness, so that adding a use moves no other (as DomainBed derives its own)."""
    return int(digest([seed, *use])[:16], 16) >> 1


def find(name: str | Path, root: Path = LEADERBOARDS) -> Path:
    """The YAML file of a protocol given as a file, as a folder, or as `name@major` of a shipped leaderboard."""
    for path in (Path(name), root / str(name)):
        if path.is_file():
            return path
        if (path / "protocol.yaml").is_file():
            return path / "protocol.yaml"
    raise unknown("leaderboard", Path(name).name, shipped(root))


def shipped(root: Path = LEADERBOARDS) -> list[str]:
    """Names of the leaderboards in the checkout."""
    return sorted(path.parent.name for path in root.glob("*@*/protocol.yaml"))


def load(name: str | Path, overrides: Sequence[str] = ()) -> Protocol:
    """Read, override (`releases.1.recipe.epochs=2`) and validate a protocol.

    Raises:
        UserError: file missing, not YAML, unknown or ill-typed field; the message names the field.
    """
    path = find(name)
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {str(error).splitlines()[0]}") from None
    data = json.loads(json.dumps(data))  # without YAML's anchors, or an override of one release would change another
    for override in overrides:
        _override(data, override)
    try:
        protocol = TypeAdapter(Protocol).validate_python(data)
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error, Protocol)}") from None
    if not protocol.releases or not protocol.seeds:
        raise UserError(f"{path}: a protocol needs at least one release and one seed")
    return protocol


def _override(data: Any, override: str) -> None:
    path, separator, value = override.partition("=")
    if not separator:
        raise UserError(f"override '{override}' is not of the form releases.1.recipe.epochs=2")
    *parents, last = path.split(".")
    try:
        for key in parents:
            data = data[int(key)] if isinstance(data, list) else data.setdefault(key, {})
        data[int(last) if isinstance(data, list) else last] = yaml.safe_load(value)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        raise UserError(f"override '{override}': the protocol has nothing at '{path}'") from None


def describe(error: ValidationError, schema: type | None = None) -> str:
    """A pydantic error as one line: the field, what is wrong, the nearest field names for a typo."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner = {"recipe": Recipe, "head": HeadSpec, "releases": Release}
        parent = next((owner[p] for p in reversed(first["loc"][:-1]) if p in owner), schema)
        names = [f.name for f in dataclasses.fields(parent)] if dataclasses.is_dataclass(parent) else []
        return f"{where}: {unknown('field', str(first['loc'][-1]), names)}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg'].lower()}, got {first.get('input')!r:.60}{more}"
