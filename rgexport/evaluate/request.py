"""The settings of an evaluation."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rgexport.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """The settings of all suites.

    Attributes:
        folder: of the results; `length` writes state files into it, too.
        texts: files and folders of texts; empty for the text that comes with rgexport.
        limit: most tokens of a document in `text`, or None.
        context: tokens of a chunk.
        stride: tokens between the beginnings of overlapping chunks; None for no such chunks.
        trials: episodes of each task and distance in `memory`.
        farthest: the largest distance of `memory`, in tokens.
        length: tokens of `length`.
        state: a state file that `length` continues from.
        tasks: names of tasks of lm_eval, or of `task_files`.
        task_files: a folder of task files.
        examples: most examples of a task, or None.
        seed: of all random numbers.
    """

    folder: Path = Path("evaluation")
    texts: tuple[Path, ...] = ()
    limit: int | None = None
    context: int = 512
    stride: int | None = None
    trials: int = 32
    farthest: int | None = None
    length: int = 1 << 15
    state: Path | None = None
    tasks: tuple[str, ...] = ()
    task_files: Path | None = None
    examples: int | None = None
    seed: int = 0

    def resolved(self) -> "EvaluationRequest":
        """Returns a copy with absolute paths, for other processes."""
        return replace(
            self,
            folder=self.folder.absolute(),
            texts=tuple(path.absolute() for path in self.texts),
            state=self.state and self.state.absolute(),
            task_files=self.task_files and self.task_files.absolute(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON."""
        paths = {
            "folder": str(self.folder),
            "state": self.state and str(self.state),
            "task_files": self.task_files and str(self.task_files),
        }
        return asdict(self) | paths | {"texts": [str(path) for path in self.texts]}


def require_overlap(stride: int | None, context: int) -> None:
    """Refuses a stride that would skip tokens.

    Raises:
        RequestError: the stride is at least as long as a chunk.
    """
    if stride is not None and stride >= context:
        raise RequestError(
            f"--stride is {stride}, --context {context}; expected a stride of less than the context"
        )
