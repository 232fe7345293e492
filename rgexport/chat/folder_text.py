"""The text of artifacts whose folder holds the tokenizer's files, as `chat.artifact_text` asks."""

from rgexport.chat.template import ChatTemplate, load_template
from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.export.artifact import Artifact


class FolderText:
    """The files of the checkpoint, copied."""

    def tokenizer(self, artifact: Artifact) -> Tokenizer:
        """See `ArtifactText`."""
        return load_tokenizer(artifact.path)

    def template(self, artifact: Artifact) -> ChatTemplate:
        """See `ArtifactText`."""
        return load_template(artifact.path)


FORMAT = FolderText()
