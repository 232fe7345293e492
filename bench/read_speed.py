"""The memory's read speed by a small C program that has nothing to do with numpy or with us."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rgexport.runtimes.bench.roofline import READ_BYTES, ReadSpeed

SOURCE = Path(__file__).with_suffix(".c")
COMPILER = "cc", "-O3", "-march=native", "-pthread"


@contextmanager
def c_roofline(
    threads: int, nbytes: int = READ_BYTES, *, huge: bool = True, file: Path | None = None
) -> Iterator[ReadSpeed]:
    """Compiles the program and gives a function that has it measure now, in bytes per second.

    It reads `nbytes` of its own, or all of a `file` where it lies in memory.
    """
    with TemporaryDirectory() as folder:
        program = Path(folder) / "read_speed"
        subprocess.run([*COMPILER, SOURCE, "-o", program], check=True)
        size = file.stat().st_size if file else nbytes
        asked = [str(program), str(size), str(threads), str(int(huge))]
        if file:
            asked.append(str(file))
        with subprocess.Popen(
            asked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            lines, answers = process.stdin, process.stdout

            def read_speed() -> float:
                lines.write("now\n")
                lines.flush()
                return float(answers.readline())

            yield read_speed
            lines.close()
