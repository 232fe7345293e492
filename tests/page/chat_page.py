"""A browser that shows the chat page, and what a user does with it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser as Chromium
from playwright.sync_api import BrowserContext, Page, sync_playwright

from tests.page.site_server import SiteServer
from tests.web.browser import FLAGS, chromium

SECONDS = 1000.0
PATIENCE = 120 * SECONDS
LONGEST = 24
"""Tokens of a reply, so that tests are quick."""


@dataclass
class Browser:
    """Chromium without a window."""

    chromium: Chromium

    @classmethod
    @contextmanager
    def started(cls) -> Iterator["Browser"]:
        program = chromium()
        assert program, "Chromium is not installed, such as Debian's chromium-headless-shell"
        flags = [flag for flag in FLAGS if flag != "--headless"]
        with sync_playwright() as playwright:
            launched = playwright.chromium.launch(executable_path=program, args=flags)
            try:
                yield cls(launched)
            finally:
                launched.close()

    @contextmanager
    def profile(self, **options: Any) -> Iterator["Profile"]:
        """A browser with an empty storage of its own."""
        context = self.chromium.new_context(**options)
        context.set_default_timeout(PATIENCE)
        try:
            yield Profile(context)
        finally:
            context.close()


@dataclass
class Profile:
    """What tabs share: storage, and the service worker."""

    context: BrowserContext

    def open(self, url: str) -> "ChatPage":
        tab = ChatPage(self.context.new_page())
        tab.page.goto(url)
        return tab


@dataclass
class ChatPage:
    """A tab."""

    page: Page
    said: list[str] = field(default_factory=list)
    """What the console has, and errors that nothing caught."""

    def __post_init__(self) -> None:
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))

    def wait_until_open(self) -> str:
        """Waits for the model; what it runs on."""
        self.page.wait_for_selector("#talk:visible")
        return self.page.inner_text("#engine")

    def say(self, text: str) -> str:
        """Says something by the keyboard; the reply."""
        count = self.page.locator("article.assistant").count()
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")
        reply = self.page.locator("article.assistant").nth(count)
        reply.wait_for()
        self.page.wait_for_selector("#send:visible")
        return reply.inner_text()

    @property
    def tokens_read(self) -> int:
        """Tokens that the model read and wrote for the last reply."""
        said = self.page.get_attribute("#engine", "title") or ""
        return int(re.sub(r"\D", "", said))

    @property
    def messages(self) -> list[str]:
        return self.page.locator("article").all_inner_texts()

    @property
    def error(self) -> str:
        return self.page.inner_text("#error")

    @property
    def unsaved(self) -> str:
        """What the page says of conversations that it could not store."""
        return self.page.inner_text("#unsaved")

    def wait_for_error(self) -> str:
        self.page.wait_for_selector("#error:not(:empty)")
        return self.error

    def save(self, folder: Path) -> Path:
        """The conversation as a file."""
        with self.page.expect_download() as download:
            self.page.click("#export")
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path

    def load(self, path: Path) -> None:
        self.page.set_input_files("#file", path)


def opened(profile: Profile, server: SiteServer, query: str = "") -> ChatPage:
    """A tab with the model loaded, and short replies."""
    tab = profile.open(server.url + query)
    tab.wait_until_open()
    limit_replies(tab)
    return tab


def limit_replies(tab: ChatPage) -> None:
    tab.page.click("summary")
    tab.page.fill("#longest", str(LONGEST))
    tab.page.click("summary")


def plain(text: str) -> str:
    """What is left of a reply on the screen, where Markdown joins lines."""
    return " ".join(text.split())
