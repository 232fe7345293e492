"""The pictures of README.md and the docs: terminals and the report, made by running the demo.

    python -m bench.pictures [--docs docs/pictures]

Runs the commands of `SCENES` and `CHAT` in a pseudo-terminal and writes what it shows at the end
as `terminal.svg` and `chat.svg`; validates the demo and writes the top of its HTML report as
`report.png`; chats in the page of `rgexport web`, on a screen and on a phone, as `page.png` and
`page-phone.png`. The last three take Chromium, such as Debian's
`chromium-headless-shell`.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from bench.run import START
from bench.terminal import Scene, play
from rgexport.artifacts.opening import open_artifact
from rgexport.web_page.site import make_site
from tests.npm.browser import launched
from tests.web_page.chat_page import Profile
from tests.web_page.site_server import serving

COLUMNS = 96
ROOT = Path(__file__).parents[1]
DEMO = "demo-int4-onnx"
VALIDATE = "validate", DEMO, "-m", "demo/model"
SCENES = (
    Scene(("onnx", "--size", "demo", "--int4")),
    Scene(("chat", DEMO), typed=("Hello! How are you?", "/quit")),
    Scene(VALIDATE, last_line="bits per byte: artifact"),
)
CHAT = (
    Scene(
        ("chat", DEMO),
        typed=(
            "Hello! How are you?",
            "/set temperature 0.8",
            "What do you see at the harbour?",
            "/stats",
            "/save talk.state",
            "/undo",
            "/quit",
        ),
    ),
    Scene(("state", "info", "talk.state")),
)
"""After the scenes before it."""
REPORT_SIZE = {"width": 1100, "height": 900}
PAGES = {"page": (1100, 620, "light"), "page-phone": (390, 844, "dark")}
"""Picture → width and height in pixels, colour scheme."""
PAGE_MESSAGES = "Hello!", "Do you like music?", "What did you do today?"
FORMAT = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" \
xmlns="http://www.w3.org/2000/svg">
<!-- Written by `make pictures`. -->
<style>
.{unique_id}-matrix {{
    font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
    font-size: {char_height}px; line-height: {line_height}px;
}}
.{unique_id}-title {{ font-size: 18px; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""As rich's own, without the font that it would fetch."""


def main() -> None:
    """Makes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, default=Path("docs/pictures"))
    folder = parser.parse_args().docs
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as work:
        (Path(work) / "demo").symlink_to(ROOT / "demo")  # a path that is the same everywhere
        for name, scenes in {"terminal": SCENES, "chat": CHAT}.items():
            lines = [line for scene in scenes for line in play(scene, Path(work), COLUMNS)]
            (folder / f"{name}.svg").write_text(terminal_svg(lines, name))
        report_picture(Path(work), (folder / "report.png").absolute())
        page_pictures(Path(work), folder)


def terminal_svg(lines: Sequence[Text], name: str) -> str:
    """A picture of a terminal window that shows these lines."""
    with open("/dev/null", "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        for line in lines:
            console.print(line, no_wrap=True, highlight=False)
        return console.export_svg(
            title="rgexport",
            theme=SVG_EXPORT_THEME,
            code_format=FORMAT,
            unique_id=name,
        )


def report_picture(work: Path, target: Path) -> None:
    """Validates the demo that lies in `work`, and has Chromium draw the top of its report."""
    command = [sys.executable, "-c", START, *VALIDATE, "--html", "report.html"]
    subprocess.run(command, cwd=work, stdout=subprocess.DEVNULL, check=True)
    with launched() as browser, browser.new_context(viewport=REPORT_SIZE) as context:
        page = context.new_page()
        page.goto((work / "report.html").as_uri())
        page.screenshot(path=target)


def page_pictures(work: Path, folder: Path) -> None:
    """Chats with the demo in the page of `rgexport web`."""
    export = [sys.executable, "-c", START, "onnx", "--size", "demo", "--profile", "wasm"]
    subprocess.run([*export, "-o", "wasm"], cwd=work, stdout=subprocess.DEVNULL, check=True)
    made = make_site([open_artifact(work / "wasm")])
    with serving(made) as server, launched() as browser:
        for name, (width, height, scheme) in PAGES.items():
            viewport = {"width": width, "height": height}
            with browser.new_context(viewport=viewport, color_scheme=scheme) as context:
                tab = Profile(context).open(server.url)
                tab.wait_until_open()
                for message in PAGE_MESSAGES:
                    tab.say(message)
                tab.page.screenshot(path=folder / f"{name}.png")


if __name__ == "__main__":
    main()
