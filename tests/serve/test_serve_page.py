"""The demo page in a browser: image input, result, map, errors and accessibility."""

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from browsers import chromium
from PIL import Image
from serve_fixtures import server

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Page = sync_api.Page
expect = sync_api.expect


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with server(formats="all") as (_, address):
        yield address


@pytest.fixture
def page(browser: "sync_api.Browser", address: str) -> Iterator["Page"]:
    with open_page(browser, address) as page:
        yield page


@contextmanager
def open_page(browser: "sync_api.Browser", address: str) -> Iterator["Page"]:
    """Open the page, and check that it contacts no other server and raises no error."""
    page = browser.new_page(reduced_motion="reduce")
    requested: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    yield page
    page.close()
    assert not errors
    assert all(url.startswith((address, "blob:", "data:")) for url in requested)


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a landscape image, green on the left half and darker blue on the right."""
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:, :50, 1] = 250
    pixels[:, 50:, 2] = 150
    path = tmp_path_factory.mktemp("images") / "halves.png"
    Image.fromarray(pixels).save(path)
    return path


def overlay_alpha(page: "Page") -> list[float]:
    """Return the alpha of the map overlay on the left and on the right, from 0 to 255."""
    alpha = page.locator("#map").evaluate(
        "map => [64, 192].map(x => map.getContext('2d').getImageData(x, 128, 1, 1).data[3])"
    )
    return list(alpha)


def test_an_image_shows_probabilities_and_a_map(page: "Page", image_file: Path) -> None:
    page.set_input_files("#file", image_file)
    expect(page.get_by_role("status")).to_have_text(re.compile(r"^Most likely green, \d+\.\d %$"))
    rows = page.get_by_role("radio")
    expect(rows).to_have_count(3)
    names = page.locator(".name").all_inner_texts()
    assert names == ["green", "blue", "red"]
    percentages = [
        float(text.rstrip(" %").lstrip("< "))
        for text in page.locator(".probability").all_inner_texts()
    ]
    assert sum(percentages) == pytest.approx(100, abs=0.5)
    widths = [box["width"] for bar in page.locator(".track i").all() if (box := bar.bounding_box())]
    track = page.locator(".track").first.bounding_box()
    assert track
    assert widths[0] == pytest.approx(track["width"] * percentages[0] / 100, abs=2)
    left, right = overlay_alpha(page)
    assert left < 10 < 150 < right
    expect(page.locator("#image")).to_have_attribute("alt", "Your image, most likely green")


def test_the_keyboard_selects_the_map_of_another_class(page: "Page", image_file: Path) -> None:
    page.set_input_files("#file", image_file)
    page.get_by_role("radio", name="green").focus()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("radio", name="blue")).to_be_checked()
    left, right = overlay_alpha(page)
    assert left > 150 > right
    page.keyboard.press("ArrowDown")
    expect(page.locator("#caption")).to_have_text("No region of the image supports red.")
    page.get_by_role("checkbox").uncheck()
    expect(page.locator("#map")).to_be_hidden()


def test_an_image_of_another_format_is_classified_with_a_notice(
    page: "Page", image_file: Path, tmp_path: Path
) -> None:
    tiff = tmp_path / "halves.tiff"
    Image.open(image_file).save(tiff)
    page.set_input_files("#file", tiff)
    expect(page.get_by_role("status")).to_have_text(re.compile("^Most likely green, "))
    expect(page.get_by_text("This browser cannot display the image")).to_be_visible()
    expect(page.locator("#map")).to_be_hidden()  # the map would cover the notice
    page.get_by_role("radio", name="blue").check(force=True)
    expect(page.locator("#map")).to_be_hidden()
    expect(page.locator("#caption")).to_be_empty()
    page.set_input_files("#file", image_file)
    expect(page.locator("#map")).to_be_visible()


def test_a_text_file_shows_an_error_and_the_next_image_a_result(
    page: "Page", image_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not an image")
    page.set_input_files("#file", image_file)
    expect(page.get_by_role("radio")).to_have_count(3)
    page.set_input_files("#file", text)
    expect(page.get_by_role("alert")).to_have_text(re.compile(r"^Cannot read notes\.txt: "))
    expect(page.locator("#classes")).to_be_hidden()
    expect(page.locator("#image")).to_be_hidden()
    page.set_input_files("#file", image_file)
    expect(page.get_by_role("status")).to_contain_text("green")
    expect(page.get_by_role("alert")).to_have_text("")


@pytest.mark.parametrize("action", ["drop", "paste"])
def test_an_image_can_be_dropped_or_pasted(page: "Page", image_file: Path, action: str) -> None:
    content = base64.b64encode(image_file.read_bytes()).decode()
    event = page.evaluate_handle(
        """([action, content]) => {
            const files = new DataTransfer();
            const bytes = Uint8Array.from(atob(content), (char) => char.charCodeAt(0));
            files.items.add(new File([bytes], "a.png", { type: "image/png" }));
            const event = action === "drop"
                ? new DragEvent("drop", { dataTransfer: files, bubbles: true })
                : new ClipboardEvent("paste", { clipboardData: files, bubbles: true });
            document.body.dispatchEvent(event);
        }""",
        [action, content],
    )
    event.dispose()
    expect(page.get_by_role("status")).to_contain_text("green")


def test_a_file_that_is_too_large_is_not_sent(page: "Page", tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(bytes(17 * 2**20))
    page.set_input_files("#file", large)
    expect(page.get_by_role("alert")).to_contain_text("larger than 16 MiB")


def test_a_stopped_server_causes_an_error_message(page: "Page", image_file: Path) -> None:
    page.route("**/v1/predict*", lambda route: route.abort())
    page.set_input_files("#file", image_file)
    expect(page.get_by_role("alert")).to_contain_text("The server is not responding")


def test_the_keyboard_reaches_all_controls(page: "Page", image_file: Path) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_label("Choose an image")).to_be_focused()
    page.set_input_files("#file", image_file)
    expect(page.get_by_role("status")).to_contain_text("green")
    page.get_by_label("Choose another").focus()
    focused = []
    for _ in range(3):
        page.keyboard.press("Tab")
        focused.append(page.locator(":focus").evaluate("node => node.type || node.href"))
    assert focused[:2] == ["checkbox", "radio"]
    assert focused[2].endswith("/docs")
    expect(page.get_by_role("group", name=re.compile("Select a class"))).to_be_visible()


@pytest.mark.parametrize("width", [320, 400, 1280])
def test_the_page_does_not_overflow_at_any_width(
    page: "Page", image_file: Path, width: int
) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    for address in (page.url, page.url + "docs"):
        page.goto(address)
        if not address.endswith("docs"):
            page.set_input_files("#file", image_file)
            expect(page.get_by_role("status")).to_contain_text("green")
        assert page.locator("html").evaluate("html => html.scrollWidth") <= width


def test_scrollable_regions_are_focusable_and_labeled(page: "Page") -> None:
    for address, count in ((page.url, 1), (page.url + "docs", 6)):
        page.goto(address)
        regions = page.locator("body *").evaluate_all(
            """nodes => nodes.filter((node) => getComputedStyle(node).overflowX === "auto")
                .map((node) => [node.tabIndex, node.getAttribute("role"), node.ariaLabel])"""
        )
        assert len({label for _, _, label in regions if label}) == len(regions) >= count
        assert {(tab_index, role) for tab_index, role, _ in regions} == {(0, "region")}


def test_the_pretrained_model_recognizes_a_cat(browser: "sync_api.Browser", tmp_path: Path) -> None:
    data = pytest.importorskip("skimage.data")
    cat = tmp_path / "chelsea.jpg"
    Image.fromarray(data.chelsea()).save(cat)
    with server(run="resnet56") as (_, address), open_page(browser, address) as page:
        page.set_input_files("#file", cat)
        expect(page.get_by_role("status")).to_contain_text("Most likely cat")
        expect(page.get_by_role("radio")).to_have_count(10)
