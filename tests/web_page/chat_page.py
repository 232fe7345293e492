"""Tabs of a browser that show the chat page, and what a user does with it."""

import re

PATIENCE = 300_000.0  # milliseconds
LONGEST = 24  # tokens of a reply, so that tests are quick


class Profile:
    """What tabs share: storage, and the service worker."""

    def __init__(self, context):
        self.context = context
        context.set_default_timeout(PATIENCE)

    def open(self, url):
        tab = ChatPage(self.context.new_page())
        tab.page.goto(url)
        return tab

    def talk(self, server, query=""):
        """Opens a tab, waits for the model, and asks for short replies."""
        tab = self.open(server.url + query)
        tab.wait_until_open()
        tab.set("longest", LONGEST)
        return tab


class ChatPage:
    def __init__(self, page):
        self.page = page
        self.said: list[str] = []
        """What the console has, and errors that nothing caught."""
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(str(error)))

    def wait_until_open(self):
        self.page.wait_for_selector("#talk:visible")

    def reload(self):
        self.page.reload()
        self.wait_until_open()

    def set(self, name, value):
        self.page.click("summary")
        self.page.fill(f"#{name}", str(value))
        self.page.click("summary")

    def ask(self, text):
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")

    def say(self, text):
        """Says something; returns the reply."""
        count = self.page.locator("article.assistant").count()
        self.ask(text)
        reply = self.page.locator("article.assistant").nth(count)
        reply.wait_for()
        self.page.wait_for_selector("#send:visible")
        return reply.inner_text()

    @property
    def tokens_read(self):
        """Tokens that the model read and wrote for the last reply."""
        return int(re.sub(r"\D", "", self.page.get_attribute("#engine", "title") or ""))

    @property
    def messages(self):
        return self.page.locator("article").all_inner_texts()

    @property
    def thread(self):
        (thread,) = (worker for worker in self.page.workers if "assets/worker" in worker.url)
        return thread

    def text(self, name):
        """Returns what an element of the page says, such as `error`."""
        return self.page.inner_text(f"#{name}")

    def focused(self):
        return self.page.evaluate("document.activeElement.id || document.activeElement.tagName")

    def wait_for_error(self):
        self.page.wait_for_selector("#error:not(:empty)")
        return self.text("error")

    def wait_until_saved(self):
        self.page.wait_for_selector("#unsaved:empty", state="attached")

    def agree(self):
        self.page.once("dialog", lambda dialog: dialog.accept())

    def save(self, folder):
        with self.page.expect_download() as download:
            self.page.click("#export")
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path

    def load(self, path):
        self.page.set_input_files("#file", path)


def plain(text):
    """What is left of a reply on the screen, where Markdown joins lines."""
    return " ".join(text.split())
