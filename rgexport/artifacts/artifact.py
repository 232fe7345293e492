"""An opened artifact: its files checked, its weights dequantized."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.artifacts.manifest import CARD, COLUMNS, MANIFEST, Manifest, StoredTensor
from rgexport.artifacts.origin import Origin, origin_of_card
from rgexport.artifacts.storage import aligned, groups_of
from rgexport.errors import RequestError
from rgexport.files.hashing import (
    FileRecord,
    hash_file,
    hash_files,
    hash_new_files,
    remember_hashes,
)
from rgexport.griffin.tensor import RowTensor, WeightSource
from rgexport.quantize.schemes.registry import Parts
from rgexport.units import amount


@dataclass(frozen=True, repr=False)
class Artifact:
    """An exported model: a folder with its manifest, or one GGUF file.

    With `allow_foreign`, engines may run a graph with ops that rgexport does not write.
    """

    path: Path
    manifest: Manifest
    allow_foreign: bool = field(default=False, kw_only=True)

    def __repr__(self) -> str:
        precision, check = self.manifest.precision, self.manifest.check.status
        return f"<{type(self).__name__} {self.path}: {precision}, {amount(self.nbytes)}, {check}>"

    @property
    def nbytes(self) -> int:
        """The size of all files; others that lie in the folder do not count."""
        if self.path.is_file():
            return self.path.stat().st_size
        files = sum(record.size for record in self.manifest.files.values())
        return files + self.file(MANIFEST).stat().st_size

    def __fspath__(self) -> str:
        return str(self.path)

    def file(self, name: str) -> Path:
        return self.path / name

    def tensor(self, name: str) -> RowTensor:
        """Returns a weight dequantized to float32, in its canonical shape, to be read in slabs."""
        stored = self.manifest.tensors.get(name)
        if stored is None:
            raise RequestError(f"{self.path} has no tensor {name!r}")
        return RowTensor(stored.shape, np.dtype(np.float32), partial(self._read_rows, name))

    @property
    def weights(self) -> WeightSource:
        return {name: self.tensor(name) for name in self.manifest.tensors}

    def facts(self) -> dict[str, Any]:
        """Returns facts for `rgexport inspect` that are not in the manifest, as plain JSON."""
        return {}

    def _read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        stored = self.manifest.tensors[name]
        rows = np.empty((stop - start, *stored.shape[1:]), np.float32)
        for group in groups_of(stored):
            first, last = group.run(start, stop)
            if first < last:
                rows[group.chosen(start, stop)] = self._group_rows(name, group.stored, first, last)
        return rows

    def _group_rows(self, name: str, stored: StoredTensor, start: int, stop: int) -> np.ndarray:
        together = stored.rows_together
        first, last = start // together * together, aligned(stop, together)
        arrays = {
            "data" if label == COLUMNS else label: self._part(stored, label, first, last)
            for label in stored.parts
        }
        columns = int(np.prod(stored.shape[1:], dtype=np.int64))
        rows = self._decode(name, stored, arrays, columns)[start - first : stop - first]
        return rows.reshape(stop - start, *stored.shape[1:])

    def _decode(self, name: str, stored: StoredTensor, arrays: Parts, columns: int) -> np.ndarray:
        return stored.uniform.decode(arrays, columns)

    def _part(self, stored: StoredTensor, label: str, start: int, stop: int) -> np.ndarray:
        part, dtype = stored.parts[label], np.dtype(stored.parts[label].dtype)
        path = self.file(part.file)
        truncated = RequestError(f"{path} was truncated while it was read")
        if label == COLUMNS:
            try:
                mapped = np.memmap(path, dtype, "r", part.offset, part.shape)
            except ValueError:
                raise truncated from None
            return np.ascontiguousarray(mapped[:, start:stop].T)
        offset, end = stored.row_offset(label, start), stored.row_offset(label, stop)
        count = (end - offset) // dtype.itemsize
        items = np.fromfile(path, dtype, count, offset=offset)
        if items.size != count:
            raise truncated
        return items.reshape((end - offset) // part.row_bytes, -1)

    def origin(self) -> Origin:
        return origin_of_card(self.file(CARD))

    def notes(self) -> list[str]:
        card, record = self.file(CARD), self.manifest.files.get(CARD)
        notes = []
        if record and not card.is_file():
            notes.append(f"{CARD} was removed")
        elif record and hash_file(card).sha256 != record.sha256:
            notes.append(f"{CARD} was edited")
        added = sorted(files_of(self.path) - self.manifest.files.keys())
        return notes + [f"{name} was added" for name in added]

    def complaints(self, verify: bool) -> list[str]:
        """Lists damaged files: by size first, and by hash only if the sizes are right."""
        return list(self._wrong_sizes()) or list(self._wrong_hashes(verify))

    @property
    def _sealed(self) -> dict[str, FileRecord]:
        return {name: record for name, record in self.manifest.files.items() if name != CARD}

    def _wrong_sizes(self) -> Iterator[str]:
        for name, record in self._sealed.items():
            path = self.file(name)
            if not path.is_file():
                yield f"{name} is missing"
            elif (size := path.stat().st_size) != record.size:
                yield f"{name} has {size} bytes instead of {record.size}"

    def _wrong_hashes(self, anew: bool) -> Iterator[str]:
        records = {self.file(name): record for name, record in self._sealed.items()}
        for path, digest in (hash_files if anew else hash_new_files)(records).items():
            if digest != records[path].sha256:
                yield f"{path.relative_to(self.path)} was altered (its hash differs)"


def differences(
    kind: str, actual: Mapping[str, object], expected: Mapping[str, object]
) -> Iterator[str]:
    """Yields how named values of a program differ from the expected ones; `kind` is said first."""
    for name in sorted(actual.keys() | expected.keys()):
        value, right = actual.get(name, "missing"), expected.get(name, "not there")
        if value != right:
            yield f"{kind} {name} is {value}; expected {right}"


def files_of(folder: Path) -> set[str]:
    """Returns relative names of the files in `folder`, without the manifest and hidden ones."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    visible = (path for path in paths if not any(part.startswith(".") for part in path.parts))
    return {path.as_posix() for path in visible} - {MANIFEST}


def record_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, FileRecord]:
    paths = {name: folder / name for name in sorted(files_of(folder) if names is None else names)}
    hashes = hash_files(paths.values())
    return {name: FileRecord(hashes[path], path.stat().st_size) for name, path in paths.items()}


def remember_verified(folder: Path, manifest: Manifest) -> None:
    """Records the exporter's hashes, so that the next opening need not hash the files."""
    remember_hashes({folder / name: record.sha256 for name, record in manifest.files.items()})
