"""What a format of artifacts has to say on this floor: what it stores, how it opens, its card."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.formats import FORMATS, format_on
from rgexport.quantize.scheme import Scheme

Layouts = Mapping[str, tuple[str, tuple[int, ...]]]
"""Part name → dtype and shape."""


@dataclass(frozen=True)
class CardText:
    """What a model card says of a format.

    Attributes:
        engine: what runs the artifact.
        float32: what is computed in float32, whatever the precision.
        run: how to run it, as Markdown.
    """

    engine: str
    float32: str
    run: str


class Format:
    """What all formats have."""

    precisions: Collection[str] = ()
    """Words for how weights are stored."""
    runs_on: str = ""
    """Where an artifact runs, as `It runs …` goes on, if that has to be said."""
    hash_name: str = "sha256"
    """What the hash of a file in the manifest is of."""

    def describe_foreign(self, path: Path, *, verify: bool) -> dict[str, Any] | None:
        """Describes a model of this format that is no artifact of ours; None of anything else."""
        return None


class FileFormat(Format, ABC):
    """A format whose artifacts are single files."""

    @abstractmethod
    def owns(self, path: Path) -> bool:
        """Whether a path is meant to be such a file."""

    @abstractmethod
    def open(self, path: Path, *, verify: bool) -> Artifact:
        """Opens what `owns` says yes to; see `opening.open_artifact`."""


class FolderFormat(Format, ABC):
    """A format whose artifacts are folders with an `rgexport.json`."""

    manifest: type[Manifest] = Manifest
    entries: Collection[str] = ()
    """Files or folders of an artifact that may be given in its place."""

    def artifact(self, folder: Path, manifest: Manifest) -> Artifact:
        """The artifact in a folder, whose files have not been looked at."""
        return Artifact(folder, manifest)

    @abstractmethod
    def part_layouts(self, shape: tuple[int, ...], scheme: Scheme) -> Layouts:
        """The parts of a tensor of `shape` that is stored by `scheme`.

        Raises:
            RequestError: the format does not have that scheme, or not for that shape.
        """

    def check_manifest(self, manifest: Manifest) -> None:
        """Looks at what only manifests of this format have.

        Raises:
            Mismatch: they contradict themselves.
        """
        return  # most have nothing of their own

    @abstractmethod
    def card(self, manifest: Manifest, verb: str) -> CardText:
        """What the card says; `verb` is the command that lets the artifact speak."""


def format_of(kind: str) -> Format:
    """The format of a kind of artifact."""
    return cast(Format, format_on("export", kind))


def folder_format(kind: str) -> FolderFormat | None:
    """The format of a kind of artifact that is a folder; None of any other word."""
    form = format_of(kind) if kind in FORMATS else None
    return form if isinstance(form, FolderFormat) else None


def all_formats() -> list[Format]:
    """All that are registered."""
    return [format_of(kind) for kind in FORMATS]
