"""Tokenizers and chat templates of artifacts, by format."""

from typing import cast

from rgexport.artifacts.artifact import Artifact
from rgexport.chat.prompts import ChatTemplate, load_template
from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.formats import format_on


class ArtifactText:
    """Reads both from the artifact's folder, which holds copies of the checkpoint's files."""

    def tokenizer(self, artifact: Artifact) -> Tokenizer:
        return load_tokenizer(artifact.path)

    def template(self, artifact: Artifact) -> ChatTemplate:
        return load_template(artifact.path)


FORMAT = ArtifactText()


def open_tokenizer(artifact: Artifact) -> Tokenizer:
    """Returns the artifact's tokenizer; RequestError if it takes token ids only."""
    return _text_format(artifact).tokenizer(artifact)


def open_template(artifact: Artifact) -> ChatTemplate:
    """Returns the artifact's chat template, or Gemma's if it has none."""
    return _text_format(artifact).template(artifact)


def _text_format(artifact: Artifact) -> ArtifactText:
    return cast(ArtifactText, format_on("chat", artifact.manifest.kind))
