"""The pictures of the chat page in the guide: taken here, and compared with those that the guide shows.

DANLU_PICTURES=docs pytest -m slow tests/serve/ui/test_pictures.py        writes them anew
"""

import asyncio
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("streamlit")
pytest.importorskip("playwright.sync_api")

from playwright.sync_api import Browser, Page, ViewportSize, expect

from tests.serve.fake_engine import Serving, begin_stream, body_of, end_stream, list_models, send_piece, send_usage
from tests.serve.ui.test_chat_app import DESKTOP, PHONE, answers, ask, browser, choose, visited

__all__ = ["browser"]

DOCS = Path(__file__).parents[3] / "docs"
SQUARE = 16
OTHER = 12.0
"""Mean difference of two squares of pixels, of 255, from which they show another thing."""

ALIKE = 0.02
"""The share of other squares up to which pictures show the same: times differ. Two of those here have 0.05 at least."""

ANSWERS = {
    "What goes well with green tea?": "Something plain and a little sweet: mochi, shortbread or a ripe pear.",
    "给妈妈写一句生日祝福": "祝妈妈生日快乐！愿您每天都有好心情，身体康健，笑口常开。",
    "再短一点": "妈妈，生日快乐，永远年轻！",
    "1~2 or 3*4?": "1~2 is a range, and 3*4 = 12: text is shown as it was said.",
}
SLOWLY = 0.02


class Endpoint:
    """Two models that answer what the pictures ask."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/models":
            await list_models(send, "base", "wishes")
            return
        request = json.loads(await body_of(receive))
        await begin_stream(send)
        answer = ANSWERS[request["messages"][-1]["content"]]
        pieces = re.findall(r"\w+\W*|\W+", f"With my best wishes: {answer}" if request["model"] == "wishes" else answer)
        for piece in pieces:
            await send_piece(send, "m", piece)
            await asyncio.sleep(SLOWLY)
        await send_usage(send, "m", 5, len(pieces))
        await end_stream(send)


@pytest.fixture
def page(browser: Browser, serving: Serving, streamlit: Serving, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page in a window of its own, whose endpoint ends when `page.endpoint` is closed."""
    size, locale = request.param
    with ExitStack() as endpoint, ExitStack() as stack:
        url = endpoint.enter_context(serving(Endpoint()))
        window = browser.new_context(viewport=size, locale=locale)
        stack.callback(window.close)
        page = visited(window.new_page(), stack.enter_context(streamlit(f"{url}/v1")))
        page.endpoint = endpoint  # type: ignore[attr-defined]
        yield page


def in_window(size: ViewportSize, locale: str = "en-US") -> Any:
    """The window of the test's page."""
    return pytest.mark.parametrize("page", [(size, locale)], indirect=True)


def take(page: Page, name: str, folder: Path) -> None:
    """Take a picture; it shows what the guide's shows, which is replaced where that is asked for."""
    from matplotlib.image import imread

    expect(page.get_by_role("button", name=re.compile("^(Stop|停止)$"))).to_have_count(0)
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)  # what is faded in
    new, shown = folder / name, DOCS / name
    page.screenshot(path=new)
    if "DANLU_PICTURES" in os.environ:
        (Path(os.environ["DANLU_PICTURES"]) / name).write_bytes(new.read_bytes())
    one, other = (squares(np.asarray(imread(path))[..., :3] * 255) for path in (new, shown))
    assert one.shape == other.shape
    assert (np.abs(one - other) > OTHER).mean() < ALIKE
    assert f"]({name})" in (DOCS / "serving.md").read_text(encoding="utf-8")


def squares(picture: np.ndarray) -> np.ndarray:
    """Mean colours of a picture's squares."""
    rows, columns = picture.shape[0] // SQUARE, picture.shape[1] // SQUARE
    cut = picture[: rows * SQUARE, : columns * SQUARE].reshape(rows, SQUARE, columns, SQUARE, 3)
    return np.asarray(cut.mean((1, 3)))


@pytest.mark.slow
@in_window(DESKTOP)
def test_a_desktop(page: Page, tmp_path: Path) -> None:
    choose(page, "Side by side with", "wishes")
    for question in ("What goes well with green tea?", "1~2 or 3*4?"):
        ask(page, question)
        expect(answers(page).last).to_contain_text(ANSWERS[question])
    take(page, "chat-desktop.png", tmp_path)


@pytest.mark.slow
@in_window(PHONE)
def test_a_phone(page: Page, tmp_path: Path) -> None:
    for question in ("What goes well with green tea?", "1~2 or 3*4?"):
        ask(page, question)
        expect(answers(page).last).to_contain_text(ANSWERS[question])
    take(page, "chat-phone.png", tmp_path)


@pytest.mark.slow
@in_window(DESKTOP, "zh-CN")
def test_chinese(page: Page, tmp_path: Path) -> None:
    for question in ("给妈妈写一句生日祝福", "再短一点"):
        ask(page, question, "说点什么……")
        expect(answers(page).last).to_contain_text(ANSWERS[question])
    take(page, "chat-chinese.png", tmp_path)


@pytest.mark.slow
@in_window(DESKTOP)
def test_an_endpoint_that_died(page: Page, tmp_path: Path) -> None:
    ask(page, "What goes well with green tea?")
    expect(answers(page).last).to_contain_text(ANSWERS["What goes well with green tea?"])
    page.endpoint.close()  # type: ignore[attr-defined]
    page.wait_for_timeout(4000)  # until the list of models is asked for again
    ask(page, "1~2 or 3*4?")
    expect(page.get_by_text("is the endpoint up")).to_have_count(2)  # of the answer, and of the list of models
    expect(answers(page).nth(1)).to_contain_text("a ripe pear")  # what was said stays
    take(page, "chat-endpoint-down.png", tmp_path)
