"""The record: all that is kept of one (protocol, method, seed). Plain JSON, versioned, unknown fields refused. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmark.errors import UserError
from benchmark.files import write_json
from benchmark.protocol import describe

SCHEMA_VERSION = 1
METRICS_VERSION = 1  # raised when the definition of a metric changes, so that numbers of two definitions never mix

STRATA = ("all", "old-seen", "new-only", "never-seen")  # the order in which people see them

Number = Annotated[float, Field(allow_inf_nan=False)]
Matrix = list[list[Number | None]]  # T x T, rows = query release, columns = gallery release; null above the diagonal


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProtocolInfo(Strict):
    id: str
    version: str
    sha256: str
    overrides: list[str]  # empty unless the protocol was changed for this run: then the record is off-protocol
    split: str


class SuiteInfo(Strict):
    version: str
    metrics_version: int
    commit: str | None
    dirty: bool | None


class MethodInfo(Strict):
    name: str
    reference: str  # module.Class
    hyperparameters: dict[str, Any]
    settings: (
        str  # "paper" = the method's own defaults or a variant it names; "tuned" = what its trials chose; "custom"
    )
    source_sha256: str
    mode: str  # chain | pairwise


class ReleaseInfo(Strict):
    name: str
    backbone: str
    classes: int
    dim: int  # stored per item, extra dims included
    recipe: dict[str, Any]
    recipe_deviates: bool
    losses: dict[str, list[Number]]  # term -> mean of each epoch
    weights_sha256: str


class LinkInfo(Strict):
    """A map between two releases that were trained independently."""

    release: int
    stored: int  # the older release it leads to
    parameters: int  # numbers that serve, weights as they are multiplied; running statistics of batch norm not counted
    multiply_adds: dict[str, int]  # "query", "gallery": per vector of that side, which passes it
    pairs: int | None  # embeddings by both releases that a closed form was fitted to
    recipe: dict[str, Any] | None  # of a trained one
    losses: dict[str, list[Number]]
    weights_sha256: str
    fusion: list[Number] | None = None  # weights of a fusion with the old query, chosen on held-out pairs


class Cost(Strict):
    """Billed as if the row were run alone, by release where it is a list.

    Parameters are those of the release and of the maps that its update adds, to every older release where they are direct.
    Trained: what a gradient or a closed form sets, a release that a map starts from included; an encoder of side information
    counts where it was trained. Released: what is stored to serve with, an encoder of side information included; running
    statistics of batch norm are not counted. Embedding the training images once, for class means or for maps fitted to stored
    embeddings, is billed neither as training images nor as teacher forwards.
    """

    training_images: int  # seen in training, the releases it builds on and oracles it needs included
    teacher_forwards: int  # images through frozen old models and oracles during training
    trained_parameters: list[int]
    released_parameters: list[int]
    bytes_per_item: list[
        int
    ]  # float32: what is searched, originals that the next update's direct maps read, side information
    query_encoders: int  # run per query, at most
    query_multiply_adds: list[int]  # encoders and maps, of the dearest gallery
    items_reembedded: int
    vectors_rewritten: int
    tuning_images: int = 0  # seen in the trials that chose the settings
    gallery_multiply_adds: list[int] = Field(
        default_factory=list
    )  # per stored item that the release's update moves, at most
    # per item written by the release: its encoder and those of side information; empty where the encoder is alone
    ingest_multiply_adds: list[int] = Field(default_factory=list)


class Timing(Strict):
    """Not part of what must be reproduced."""

    training_seconds: Number
    total_seconds: Number
    shared_seconds: Number  # spent on nodes that independent training or another method needs too
    threads: int
    device: str
    finished: str  # ISO 8601, UTC


class Record(Strict):
    schema_version: int
    protocol: ProtocolInfo
    suite: SuiteInfo
    method: MethodInfo
    seed: int
    data_fingerprint: str
    releases: list[ReleaseInfo]
    matrices: dict[str, dict[str, Matrix]]  # metric -> stratum -> matrix
    independent: dict[str, dict[str, Matrix]]  # the same of independent training: bounds and oracles
    undefined: dict[str, str]  # "t,k" -> why the cell is null
    queries: dict[str, int]  # stratum -> queries counted
    dropped: int  # queries without a positive
    summary: dict[str, Any]  # computed by the suite: stratum -> AC, AC95, AM, gains, flips
    cost: Cost
    environment: dict[str, str]
    outputs: dict[str, str]  # file beside the record -> sha256
    timing: Timing
    links: list[LinkInfo] = Field(default_factory=list)

    def save(self, path: Path) -> Path:
        write_json(path, self.model_dump(mode="json"))
        return path

    def reproducible(self) -> dict[str, Any]:
        """Everything that the same command must give again, bit for bit."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k != "timing"}


def ordered(strata: Iterable[str]) -> list[str]:
    """Strata as they are shown: the usual ones first, a task's own after them."""
    return sorted(strata, key=lambda name: (STRATA.index(name) if name in STRATA else len(STRATA), name))


def load(path: Path) -> Record:
    """Read a record, ours or a stranger's; nothing in it is executed.

    Raises:
        UserError: not JSON, an unknown or ill-typed field, another schema version.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        record = Record.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{path}: not a record of schema {SCHEMA_VERSION}: {describe(error)}") from None
    if record.schema_version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema version {record.schema_version}; this suite reads version {SCHEMA_VERSION}")
    return record
