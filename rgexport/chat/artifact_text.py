"""Where the artifacts of a format keep their tokenizer and their chat template."""

from typing import cast

from rgexport.chat.template import ChatTemplate, load_template
from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.export.artifact import Artifact
from rgexport.formats import format_on


class ArtifactText:
    """Reads both from the artifact's folder, which holds copies of the checkpoint's files."""

    def tokenizer(self, artifact: Artifact) -> Tokenizer:
        """See `open_tokenizer`."""
        return load_tokenizer(artifact.path)

    def template(self, artifact: Artifact) -> ChatTemplate:
        """See `open_template`."""
        return load_template(artifact.path)


FORMAT = ArtifactText()


def open_tokenizer(artifact: Artifact) -> Tokenizer:
    """The artifact's own tokenizer.

    Raises:
        RequestError: the artifact takes token ids only, or its vocabulary cannot be read.
    """
    return _text_of(artifact).tokenizer(artifact)


def open_template(artifact: Artifact) -> ChatTemplate:
    """The artifact's chat template, or Gemma's where it has none.

    Raises:
        RequestError: it cannot be read.
    """
    return _text_of(artifact).template(artifact)


def _text_of(artifact: Artifact) -> ArtifactText:
    return cast(ArtifactText, format_on("chat", artifact.manifest.kind))
