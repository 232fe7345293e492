"""Compares the files that rgexport writes into an artifact's folder with those of this version."""

from collections.abc import Iterator

from rgexport._version import __version__
from rgexport.export.artifact import Artifact, files_of
from rgexport.export.format import folder_format
from rgexport.export.manifest import CARD
from rgexport.griffin.tokenizer_files import TOKENIZER_FILES, find_tokenizer_files
from rgexport.kernels.onnx.library import LIBRARY
from rgexport.validate.identity.items import IdentityItem, compared, first_names, not_compared
from rgexport.validate.identity.text import completed_copy, file_pair, file_words


def written_files(artifact: Artifact) -> Iterator[IdentityItem]:
    """Compares each file with what follows from the manifest and the artifact's own tokenizer.

    Copies of the checkpoint's files are left out: they are compared with the original's. Files that
    rgexport does not write are one item, which names them.

    Raises:
        RequestError: a file is too large, or the tokenizer's settings cannot be read.
    """
    manifest, folder = artifact.manifest, artifact.path
    form, names = folder_format(manifest.kind), files_of(folder)
    assert form is not None, "artifacts of other formats are no folders"
    with completed_copy(find_tokenizer_files(folder), manifest.name) as (copy, ids):
        form.write_program_files(copy, manifest, ids, names)
        written = {name: file_pair(folder / name, copy / name) for name in sorted(files_of(copy))}
    version = manifest.created_with.get("rgexport", "of an unknown version")
    for name, pair in written.items():
        item = compared(name, *pair, "rgexport writes")
        if item.outcome == "differs" and version != __version__:
            item = not_compared(name, item.artifact, f"written by rgexport {version[:40]}")
        if item.outcome != "same" or name not in TOKENIZER_FILES:
            yield item
    parts = (part for stored in manifest.tensors.values() for part in stored.parts.values())
    model = {part.file.partition("/")[0] for part in parts} | {*form.entries}
    known = {CARD, *TOKENIZER_FILES, *written}
    if LIBRARY.name in names and file_words(folder / LIBRARY.name) == file_words(LIBRARY):
        known.add(LIBRARY.name)
    if foreign := sorted(n for n in names - known if n.partition("/")[0] not in model):
        yield not_compared("foreign files", first_names(foreign), "rgexport does not write them")
