"""Defines what each format of artifacts provides here: storage, opening, model card."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.control_ids import ControlIds
from rgexport.artifacts.manifest import MANIFEST, IoRecord, Manifest, StateRecord
from rgexport.errors import RequestError
from rgexport.files.targets import check_target
from rgexport.formats import FORMATS, format_on
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.quantize.schemes.registry import PartShapes, Scheme, Uniform
from rgexport.reporting.tables import Table
from rgexport.reporting.text_templates import render_text


@dataclass(frozen=True)
class CardText:
    engine: str  # runs the artifact
    float32: str  # computed in float32 with any `--compute`
    run: str  # instructions to run it, as Markdown


def render(template: str, **facts: Any) -> str:
    """Fills facts into a Markdown text of `templates/`."""
    return render_text("rgexport.artifacts", template, **facts)


class Format(ABC):
    precisions: Collection[str] = ()  # words of `--precision`
    planned_precisions: Collection[str] = ()  # words for artifacts that were made by a plan
    runs_on: str = ""
    """The end of the sentence `It runs …`, printed after an export; empty for none."""
    hash_name: str = "sha256"  # the field of `inspect --json` that has the hash of a file
    alignment: int = 1
    part_header: int = 0
    has_row_groups: bool = True  # whether the rows of a matrix may have several layouts
    keeps_bfloat16_gates: bool = False  # whether matrices of gates may be bfloat16
    completes_tokenizer: bool = False
    """Whether an export adds `tokenizer.json` where the checkpoint has only `tokenizer.model`."""
    entries: Collection[str] = ()
    """Files or folders of an artifact that a user may name instead of its folder."""

    foreign_kind: str | None = None
    """The kind in descriptions of models of this format that rgexport did not export."""

    def describe_foreign(self, path: Path) -> dict[str, Any] | None:
        """Describes a model that rgexport did not export; None if it is not of this format."""
        return None

    def foreign_text(self, description: dict[str, Any]) -> Iterator[str | Table]:
        raise NotImplementedError

    @abstractmethod
    def check_target(self, target: Path, *, force: bool) -> None:
        """Raises RequestError if an export's target exists and may not be replaced."""

    @abstractmethod
    def part_shapes(self, shape: tuple[int, ...], scheme: Scheme) -> PartShapes:
        """Returns the parts of a stored tensor; RequestError if the format lacks the scheme."""

    def candidate(self, scheme: Uniform, shape: tuple[int, ...]) -> Uniform | None:
        """Returns a scheme of a plan as it is stored for a matrix; None if it does not fit."""
        try:
            self.part_shapes(shape, scheme)
        except RequestError:
            return None
        return scheme

    @abstractmethod
    def overhead_bytes(self, checkpoint: Checkpoint) -> int:
        """Estimates the bytes of an artifact beside its weights and a `tokenizer.json` to add."""

    @abstractmethod
    def card(self, manifest: Manifest, verb: str) -> CardText:
        """Returns the card's texts; `verb` is a command: `chat .` or `generate . -p …`."""


class FileFormat(Format):
    @abstractmethod
    def owns(self, path: Path) -> bool:
        """Whether a path is meant to be such a file."""

    @abstractmethod
    def open(self, path: Path, *, verify: bool) -> Artifact:
        """Opens a path that `owns` accepts, as `open_artifact` does."""


class FolderFormat(Format):
    """A format with a folder as its artifact, described by an `rgexport.json`."""

    manifest: type[Manifest] = Manifest
    artifact: type[Artifact] = Artifact
    completes_tokenizer = True
    graph_bytes: int = 0  # estimated bytes of the graph and the manifest for each layer

    def check_target(self, target: Path, *, force: bool) -> None:
        is_artifact = (target / MANIFEST).is_file()
        check_target(target, force=force, replaceable=lambda folder: is_artifact)

    def overhead_bytes(self, checkpoint: Checkpoint) -> int:
        tokenizer = sum(path.stat().st_size for path in checkpoint.tokenizer_files)
        return tokenizer + self.graph_bytes * checkpoint.config.num_layers

    def interface(self, manifest: Manifest) -> tuple[tuple[StateRecord, ...], IoRecord]:
        return (), IoRecord((), ())

    def write_program_files(
        self, folder: Path, manifest: Manifest, ids: ControlIds, files: Collection[str]
    ) -> None:
        """Writes the files by which other programs run an artifact with these `files`."""
        return

    def check_manifest(self, manifest: Manifest) -> None:
        """Raises Mismatch if a field that only this format has is wrong."""
        return


def format_of(kind: str) -> Format:
    """Raises RequestError if there is no such format."""
    if kind not in FORMATS:
        raise RequestError(f"format is {kind!r}; expected one of {', '.join(FORMATS)}")
    return cast(Format, format_on("artifacts", kind))


def folder_format(kind: str) -> FolderFormat | None:
    form = format_of(kind) if kind in FORMATS else None
    return form if isinstance(form, FolderFormat) else None


def all_formats() -> list[Format]:
    return [format_of(kind) for kind in FORMATS]
