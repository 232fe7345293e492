"""What a format of artifacts has to say on this floor: what it stores, how it opens, its card."""

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
    """A format whose artifacts are folders with an `rgexport.json`, unless it says otherwise."""

    manifest: type[Manifest] = Manifest
    in_one_file: bool = False
    """Whether an artifact is a single file, and no folder."""
    precisions: Collection[str] = ()
    """Words for how weights are stored."""
    entries: Collection[str] = ()
    """Files or folders of an artifact that may be given in its place."""
    runs_on: str = ""
    """Where an artifact runs, as `It runs …` goes on, if that has to be said."""
    hash_name: str = "sha256"
    """What the hash of a file in the manifest is of."""

    def owns(self, path: Path) -> bool:
        """Whether a path is that of an artifact that is a single file of this format."""
        return False

    def open_file(self, path: Path, *, verify: bool) -> Artifact:
        """Opens what `owns` says yes to; see `opening.open_artifact`."""
        raise NotImplementedError

    def artifact(self, folder: Path, manifest: Manifest) -> Artifact:
        """The artifact in a folder, whose files have not been looked at."""
        return Artifact(folder, manifest)

    def part_layouts(self, shape: tuple[int, ...], scheme: Scheme) -> Layouts:
        """The parts of a tensor of `shape` that is stored by `scheme`.

        Raises:
            RequestError: the format does not have that scheme, or not for that shape.
        """
        raise NotImplementedError

    def check_manifest(self, manifest: Manifest) -> None:
        """Looks at what only manifests of this format have.

        Raises:
            Mismatch: they contradict themselves.
        """

    def card(self, manifest: Manifest, verb: str) -> CardText:
        """What the card says; `verb` is the command that lets the artifact speak."""
        raise NotImplementedError

    def describe_foreign(self, path: Path, *, verify: bool) -> dict[str, Any] | None:
        """Describes a model of this format that is no artifact of ours; None of anything else."""
        return None


def format_of(kind: str) -> Format:
    """The format of a kind of artifact."""
    return cast(Format, format_on("export", kind))


def all_formats() -> list[Format]:
    """All that are registered."""
    return [format_of(kind) for kind in FORMATS]
