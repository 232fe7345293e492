"""The page on phones and screens, light and dark: it fits, and axe-core has no complaint."""

import pytest

from tests.page.chat_page import Browser, ChatPage
from tests.page.site_server import SiteServer
from tests.web.npm import HERE, node_with_packages

SIZES = {"phone": (390, 844), "tablet": (820, 1180), "screen": (1440, 900)}

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def axe() -> str:
    node_with_packages()
    return (HERE / "node_modules" / "axe-core" / "axe.min.js").read_text()


def check(tab: ChatPage, axe: str) -> None:
    """Nothing is wider than the window, and axe-core finds nothing."""
    page = tab.page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    found = page.evaluate(f"async () => {{ {axe}; return await axe.run(); }}")
    assert [f"{each['id']}: {each['help']}" for each in found["violations"]] == []
    assert len(found["passes"]) > 10


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_state_of_the_page(
    browser: Browser, server: SiteServer, axe: str, size: str, scheme: str
) -> None:
    width, height = SIZES[size]
    viewport = {"width": width, "height": height}
    with browser.profile(viewport=viewport, color_scheme=scheme, bypass_csp=True) as profile:
        tab = profile.open(server.url)
        page = tab.page
        tab.wait_until_open()
        page.evaluate("document.getElementById('talk').hidden = true")
        page.evaluate("document.getElementById('welcome').hidden = false")
        page.evaluate("document.getElementById('load').hidden = false")
        check(tab, axe)
        page.evaluate("document.getElementById('talk').hidden = false")
        page.evaluate("document.getElementById('welcome').hidden = true")
        check(tab, axe)
        tab.say("Tell me a story. " + "Averylongword" * 20)
        check(tab, axe)
        for each in ("unsaved", "notice", "error"):
            page.evaluate(f"document.getElementById('{each}').textContent = 'Storage is full.'")
        check(tab, axe)
        if page.is_visible("#menu"):
            assert not page.is_visible("#new")
            page.click("#menu")
            assert page.get_attribute("#menu", "aria-expanded") == "true"
        page.wait_for_selector("#new:visible")
        page.click("summary")
        page.wait_for_selector("#temperature:visible")
        page.wait_for_timeout(300)  # the panel moves
        check(tab, axe)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        assert tab.said == []
