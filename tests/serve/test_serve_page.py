"""The page in a browser: a picture in, bars and a map out, and an error that says what is wrong."""

import base64
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serve_fixtures import server

from resnet56.runs import pretrained

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Page = sync_api.Page
expect = sync_api.expect

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed; any of {', '.join(BROWSERS)} will do")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with server() as (_, address):
        yield address


@pytest.fixture
def page(browser: "sync_api.Browser", address: str) -> Iterator["Page"]:
    with opened(browser, address) as page:
        yield page


@contextmanager
def opened(browser: "sync_api.Browser", address: str) -> Iterator["Page"]:
    """The page, which must ask nobody else for anything and raise no error."""
    page = browser.new_page(reduced_motion="reduce")
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    yield page
    page.close()
    assert not errors
    assert all(url.startswith((address, "blob:", "data:")) for url in asked)


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Green on the left half, a darker blue on the right, and wider than high."""
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:, :50, 1] = 250
    pixels[:, 50:, 2] = 150
    path = tmp_path_factory.mktemp("pictures") / "halves.png"
    Image.fromarray(pixels).save(path)
    return path


def veil(page: "Page") -> list[float]:
    """How dense the map's veil is at the left and at the right, 0 to 255."""
    found = page.locator("#map").evaluate(
        "map => [64, 192].map(x => map.getContext('2d').getImageData(x, 128, 1, 1).data[3])"
    )
    return list(found)


def test_a_picture_is_answered_with_bars_and_a_map(page: "Page", picture: Path) -> None:
    page.set_input_files("#file", picture)
    expect(page.get_by_role("status")).to_have_text(re.compile(r"^Most likely green, \d+\.\d %$"))
    rows = page.get_by_role("radio")
    expect(rows).to_have_count(3)
    names = page.locator(".name").all_inner_texts()
    assert names == ["green", "blue", "red"]
    shares = [
        float(text.rstrip(" %").lstrip("< ")) for text in page.locator(".share").all_inner_texts()
    ]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    widths = [box["width"] for bar in page.locator(".track i").all() if (box := bar.bounding_box())]
    full = page.locator(".track").first.bounding_box()
    assert full
    assert widths[0] == pytest.approx(full["width"] * shares[0] / 100, abs=2)
    left, right = veil(page)
    assert left < 10 < 150 < right
    expect(page.locator("#picture")).to_have_attribute("alt", "Your picture; most likely green")


def test_another_class_shows_its_own_map_by_keyboard(page: "Page", picture: Path) -> None:
    page.set_input_files("#file", picture)
    page.get_by_role("radio", name="green").focus()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("radio", name="blue")).to_be_checked()
    left, right = veil(page)
    assert left > 150 > right
    page.keyboard.press("ArrowDown")
    expect(page.locator("#caption")).to_have_text("Nothing in the picture speaks for red.")
    page.get_by_role("checkbox").uncheck()
    expect(page.locator("#map")).to_be_hidden()


def test_a_picture_that_the_browser_cannot_show_is_answered_and_said_so(
    page: "Page", picture: Path, tmp_path: Path
) -> None:
    tiff = tmp_path / "halves.tiff"
    Image.open(picture).save(tiff)
    page.set_input_files("#file", tiff)
    expect(page.get_by_role("status")).to_have_text(re.compile("^Most likely green, "))
    expect(page.get_by_text("This browser cannot show such a picture")).to_be_visible()
    expect(page.locator("#map")).to_be_hidden()  # it would lie over that sentence
    page.get_by_role("radio", name="blue").check(force=True)
    expect(page.locator("#map")).to_be_hidden()
    expect(page.locator("#caption")).to_be_empty()
    page.set_input_files("#file", picture)
    expect(page.locator("#map")).to_be_visible()


def test_a_text_file_is_told_apart_and_the_next_picture_is_answered(
    page: "Page", picture: Path, tmp_path: Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    page.set_input_files("#file", picture)
    expect(page.get_by_role("radio")).to_have_count(3)
    page.set_input_files("#file", text)
    expect(page.get_by_role("alert")).to_have_text(re.compile(r"^Cannot read notes\.txt: "))
    expect(page.locator("#classes")).to_be_hidden()
    expect(page.locator("#picture")).to_be_hidden()
    page.set_input_files("#file", picture)
    expect(page.get_by_role("status")).to_contain_text("green")
    expect(page.get_by_role("alert")).to_have_text("")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted(page: "Page", picture: Path, way: str) -> None:
    content = base64.b64encode(picture.read_bytes()).decode()
    event = page.evaluate_handle(
        """([way, content]) => {
            const files = new DataTransfer();
            const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
            files.items.add(new File([bytes], "a.png", { type: "image/png" }));
            const event = way === "drop"
                ? new DragEvent("drop", { dataTransfer: files, bubbles: true })
                : new ClipboardEvent("paste", { clipboardData: files, bubbles: true });
            document.body.dispatchEvent(event);
        }""",
        [way, content],
    )
    event.dispose()
    expect(page.get_by_role("status")).to_contain_text("green")


def test_a_file_that_is_too_large_is_not_sent(page: "Page", tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(bytes(17 * 2**20))
    page.set_input_files("#file", large)
    expect(page.get_by_role("alert")).to_contain_text("larger than 16 MiB")


def test_a_server_that_has_gone_is_said_to_have_gone(page: "Page", picture: Path) -> None:
    page.route("**/v1/predict*", lambda route: route.abort())
    page.set_input_files("#file", picture)
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")


def test_the_keyboard_reaches_everything_and_everything_has_a_name(
    page: "Page", picture: Path
) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_label("Choose a picture")).to_be_focused()
    page.set_input_files("#file", picture)
    expect(page.get_by_role("status")).to_contain_text("green")
    page.get_by_label("Choose another").focus()
    reached = []
    for _ in range(3):
        page.keyboard.press("Tab")
        reached.append(page.locator(":focus").evaluate("one => one.type || one.href"))
    assert reached[:2] == ["checkbox", "radio"]
    assert reached[2].endswith("/docs")
    expect(page.get_by_role("group", name=re.compile("Choose a class"))).to_be_visible()


@pytest.mark.parametrize("width", [320, 400, 1280])
def test_nothing_sticks_out_at_any_width(page: "Page", picture: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    for address in (page.url, page.url + "docs"):
        page.goto(address)
        if not address.endswith("docs"):
            page.set_input_files("#file", picture)
            expect(page.get_by_role("status")).to_contain_text("green")
        assert page.locator("html").evaluate("one => one.scrollWidth") <= width


def test_what_scrolls_can_be_reached_and_has_a_name(page: "Page") -> None:
    for address, count in ((page.url, 1), (page.url + "docs", 6)):
        page.goto(address)
        found = page.locator("body *").evaluate_all(
            """all => all.filter((one) => getComputedStyle(one).overflowX === "auto")
                .map((one) => [one.tabIndex, one.getAttribute("role"), one.ariaLabel])"""
        )
        assert len({name for _, _, name in found if name}) == len(found) >= count
        assert {tuple(place) for *place, _ in found} == {(0, "region")}


@pytest.mark.skipif("resnet56" not in pretrained.names(), reason="resnet56 does not ship yet")
def test_the_shipped_network_sees_a_cat(browser: "sync_api.Browser", tmp_path: Path) -> None:
    data = pytest.importorskip("skimage.data")
    cat = tmp_path / "chelsea.jpg"
    Image.fromarray(data.chelsea()).save(cat)
    with server(run="resnet56") as (_, address), opened(browser, address) as page:
        page.set_input_files("#file", cat)
        expect(page.get_by_role("status")).to_contain_text("Most likely cat")
        expect(page.get_by_role("radio")).to_have_count(10)
