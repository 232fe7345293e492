"""What reads and writes the text of an artifact: what a format has to say on this floor."""

from typing import Protocol, cast

from rgexport.chat.template import ChatTemplate
from rgexport.chat.tokenizer import Tokenizer
from rgexport.export.artifact import Artifact
from rgexport.formats import format_on


class ArtifactText(Protocol):
    """Where artifacts of a kind keep their tokenizer and their chat template."""

    def tokenizer(self, artifact: Artifact) -> Tokenizer:
        """See `open_tokenizer`."""
        ...

    def template(self, artifact: Artifact) -> ChatTemplate:
        """See `open_template`."""
        ...


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
