"""The format of GGUF files."""

from pathlib import Path

from rgexport.export.artifact import Artifact
from rgexport.export.format import CardText, FileFormat, installation
from rgexport.export.manifest import Manifest
from rgexport.quantize.gguf_header import is_gguf
from rgexport.quantize.plan import PRECISIONS

_RUN = """\
{install}, beside the file:

    rgexport llama-cpp build
    rgexport {verb}

`rgexport llama-cpp build --tools` also builds llama.cpp's own programs, such as `llama-server`,
which take the file as well (`docs/gguf.md` in rgexport's repository). Stock llama.cpp, ollama and
LM Studio do not know the architecture yet."""


class GgufFormat(FileFormat):
    """One file, with a manifest in its metadata; its card is written when it is uploaded."""

    precisions = PRECISIONS
    runs_on = (
        "in the llama.cpp that `rgexport llama-cpp build` makes (stock llama.cpp, ollama and LM "
        "Studio do not know RecurrentGemma yet)"
    )
    library = "gguf"
    hash_name = "data_sha256"  # no file can hold its own hash

    def owns(self, path: Path) -> bool:
        """Checks the file's first bytes or, where there is no file, its name."""
        return is_gguf(path) or (path.suffix == ".gguf" and not path.is_dir())

    def open(self, path: Path, *, verify: bool) -> Artifact:
        from rgexport.export.gguf.artifact import open_gguf

        return open_gguf(path, verify=verify)

    def card(self, manifest: Manifest, verb: str) -> CardText:
        run = _RUN.format(install=installation(), verb=verb.replace(" .", " FILE.gguf", 1))
        return CardText("llama.cpp", "softmax", run)


FORMAT = GgufFormat()
