"""The slides in a browser: navigation, layout at every size, contrast, and the printed PDF."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browsers import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDE: Any = {"width": 1280, "height": 720}
SIZES = ((1280, 720), (1024, 768), (390, 844), (320, 568))


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: "Browser", slide_files: dict[str, Path]) -> Iterator["Page"]:
    """Open the full deck in a window of 1280 x 720 pixels, without a network connection."""
    page = browser.new_page(viewport=WIDE)
    requested: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(slide_files["full"].as_uri())
    yield page
    page.close()
    assert not errors
    assert all(url.startswith(("file:", "data:")) for url in requested)


def shown(page: "Page") -> int:
    """Return the number of the only visible slide, and check that the page shows and links it."""
    [number] = page.locator(".slide:visible").evaluate_all("nodes => nodes.map((node) => node.id)")
    assert page.get_by_role("status").inner_text().startswith(f"{number} / 10")
    assert page.url.endswith(f"#{number}")
    return int(number)


def test_keys_change_the_slide(page: "Page") -> None:
    assert shown(page) == 1
    for key, number in (
        *(("ArrowRight", 2), ("ArrowDown", 3), ("PageDown", 4), ("Space", 5), ("End", 10)),
        *(("ArrowRight", 10), ("ArrowLeft", 9), ("ArrowUp", 8), ("PageUp", 7)),
        *(("Shift+Space", 6), ("Control+ArrowLeft", 6), ("Home", 1), ("ArrowLeft", 1)),
    ):
        page.keyboard.press(key)
        assert shown(page) == number, key


def test_buttons_change_the_slide(page: "Page") -> None:
    following = page.get_by_role("button", name="Next slide")
    previous = page.get_by_role("button", name="Previous slide")
    assert previous.is_disabled()
    following.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert shown(page) == 4
    previous.click()
    assert shown(page) == 3
    page.keyboard.press("End")
    assert following.is_disabled()


def test_clicks_change_the_slide(page: "Page") -> None:
    page.mouse.click(900, 650)
    page.mouse.click(900, 650)
    assert shown(page) == 3
    page.mouse.click(100, 650)
    assert shown(page) == 2
    box = page.locator(".current p").first.bounding_box()
    assert box
    page.mouse.move(box["x"] + 2, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 10)
    page.mouse.up()
    assert page.evaluate("getSelection().toString()")
    assert shown(page) == 2


def test_links_open_a_slide(page: "Page", slide_files: dict[str, Path]) -> None:
    address = slide_files["full"].as_uri()
    for link, number in (("#3", 3), ("#10", 10), ("#11", 10), ("#0", 1), ("#x", 1), ("#-4", 1)):
        page.goto("about:blank")
        page.goto(address + link)
        assert shown(page) == number, link
    page.evaluate("location.hash = '#7'")
    page.wait_for_function("document.querySelector('.current').id === '7'")


def test_swipes_change_the_slide(browser: "Browser", slide_files: dict[str, Path]) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    page = context.new_page()
    page.goto(slide_files["full"].as_uri())

    def swipe(right: int, down: int, selector: str = ".current h1, .current h2") -> None:
        page.locator(selector).first.evaluate(
            """(node, [right, down]) => {
                const touch = (x, y) =>
                  new Touch({ identifier: 1, target: node, clientX: x, clientY: y });
                const fire = (type, list) => node.dispatchEvent(new TouchEvent(type, {
                    bubbles: true, touches: type === "touchend" ? [] : list, changedTouches: list,
                }));
                fire("touchstart", [touch(200, 300)]);
                fire("touchend", [touch(200 + right, 300 + down)]);
            }""",
            [right, down],
        )

    swipe(-120, 10)
    assert shown(page) == 2
    swipe(-30, 0)  # too short for a swipe
    swipe(-120, 200)  # scrolls the page
    assert shown(page) == 2
    swipe(120, -10)
    assert shown(page) == 1
    page.keyboard.press("ArrowDown")  # scrolls the page
    page.locator("main").tap()
    assert shown(page) == 1
    page.goto("about:blank")
    page.goto(slide_files["full"].as_uri() + "#7")
    swipe(-120, 0, ".confusion td")  # scrolls the table
    assert shown(page) == 7
    context.close()


OVERFLOW = """() => Array.from({ length: 10 }, () => {
  const slide = document.querySelector(".current");
  const outer = slide.getBoundingClientRect();
  const inside = (node) => {
    const box = node.getBoundingClientRect();
    return box.right <= outer.right + 1 && box.bottom <= outer.bottom + 1 && box.left >= -1;
  };
  const body = slide.querySelector(".body").getBoundingClientRect();
  const footer = slide.querySelector("footer").getBoundingClientRect();
  const found = {
    number: Number(slide.id),
    scrolls: document.documentElement.scrollWidth - innerWidth,
    high: Math.max(0, ...[...slide.querySelectorAll(".body > *")].map(
      (node) => Math.max(node.getBoundingClientRect().bottom - body.bottom,
                         body.top - node.getBoundingClientRect().top))),
    out: [...slide.querySelectorAll("p, li, th, td, img, figcaption, h1, h2")]
      .filter((node) => !node.closest(".scroll, .hidden") && !inside(node))
      .map((node) => node.outerHTML.slice(0, 80)),
    text: Math.min(...[...slide.querySelectorAll("*")]
      .filter((node) => [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim()))
      .filter((node) => !(node instanceof SVGElement))
      .map((node) => parseFloat(getComputedStyle(node).fontSize))),
  };
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "PageDown", bubbles: true }));
  return found;
})"""


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_slide_of_every_run_fits(
    browser: "Browser", slide_files: dict[str, Path], width: int, height: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": height})
    fits = width >= 900
    for name, deck in slide_files.items():
        page.goto(deck.as_uri())
        slides = page.evaluate(OVERFLOW)
        assert [found["number"] for found in slides] == list(range(1, 11))
        for number, found in enumerate(slides, start=1):
            assert found["scrolls"] <= 0, (name, number, found)
            assert not found["out"], (name, number, found)
            if fits:
                assert found["high"] <= 1, (name, number, found)
            # At 1280 x 720, text is at least 20 pixels high, so a slide has at most 36 lines.
            scale = min(width / 1280, height / 720)
            assert found["text"] >= (19.9 * scale if fits else 14), (name, number, found)
    page.close()


def test_all_slides_are_visible_without_scripts(
    browser: "Browser", slide_files: dict[str, Path]
) -> None:
    context = browser.new_context(
        java_script_enabled=False, viewport={"width": 1280, "height": 720}
    )
    page = context.new_page()
    page.goto(slide_files["full"].as_uri())
    tops = [box["y"] for slide in page.locator(".slide").all() if (box := slide.bounding_box())]
    assert len(tops) == 10
    assert all(after - before >= 719 for before, after in pairwise(tops))
    assert page.locator("nav").is_hidden()
    assert page.locator(".number").nth(2).is_visible()
    assert page.locator(".number").nth(2).inner_text() == "3 / 10"
    context.close()


def test_the_pdf_has_one_landscape_page_per_slide(
    browser: "Browser", slide_files: dict[str, Path]
) -> None:
    page = browser.new_page(color_scheme="dark")
    for name, deck in slide_files.items():
        page.goto(deck.as_uri() + "#4")
        pdf = page.pdf(prefer_css_page_size=True, print_background=True)
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 10, name
        boxes = set(re.findall(rb"/MediaBox\s*\[([^]]*)\]", pdf))
        assert boxes == {b"0 0 960 540"}, name  # 16:9, in points
    page.emulate_media(media="print")
    colors = page.locator("body").evaluate(
        "body => [getComputedStyle(body).backgroundColor, getComputedStyle(body).color]"
    )
    assert colors == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
    assert page.locator(".slide:visible").count() == 10
    assert page.locator("nav").is_hidden()
    page.close()


CONTRAST = """() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = parse(color).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (node) => {
    if (!node) return "rgb(255, 255, 255)";
    const color = getComputedStyle(node).backgroundColor;
    return parse(color)[3] === 0 ? background(node.parentElement) : color;
  };
  return [...document.querySelectorAll(".slide *")]
    .filter((node) => [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim()))
    .filter((node) => !node.closest("svg"))
    .map((node) => {
      const [a, b] = [luminance(getComputedStyle(node).color), luminance(background(node))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.outerHTML.slice(0, 80)];
    })
    .sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser: "Browser", slide_files: dict[str, Path], scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(slide_files["full"].as_uri())
    background = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    assert background == {"light": "rgb(253, 253, 252)", "dark": "rgb(20, 22, 26)"}[scheme]
    ratio, node = page.evaluate(CONTRAST)
    assert ratio >= 4.5, node
    page.close()
