"""The chat page in a browser: every control, on a desktop and on a phone, before a small endpoint and a real one."""

import asyncio
import csv
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit")
pytest.importorskip("playwright.sync_api")

from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from tests.serve.fake_engine import Serving, begin_stream, body_of, end_stream, list_models, send_piece, send_usage

DESKTOP, PHONE = ViewportSize(width=1280, height=860), ViewportSize(width=390, height=844)
SECONDS = 15_000
TOPIC = "Give a topic, or join in…"
WIDE = f"| address | |\n|---|---|\n| https://example.org/{'x' * 300} | {'y' * 300} |\n"

expect.set_options(timeout=SECONDS)


class Endpoint:
    """Two models that answer with their name and what they were asked.

    `long` goes on for 20 s unless cut, `wide` gets a table of words without an end.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.cut = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/models":
            await list_models(send, "base", "wishes")
            return
        request = json.loads(await body_of(receive))
        self.bodies.append(request)
        said = request["messages"][-1]["content"].splitlines()[-1]
        words = [f"word{n} " for n in range(200)] if said == "long" else [f"{request['model']}: ", f"**{said}**"]
        words = [WIDE] if said == "wide" else words
        gone = asyncio.ensure_future(receive())
        await begin_stream(send)
        for word in words:
            await send_piece(send, "m", word)
            if (await asyncio.wait([gone], timeout=0.1))[0]:
                self.cut += 1
                return
        gone.cancel()
        await send_usage(send, "m", 5, len(words))
        await end_stream(send)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on this machine")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def engine() -> Endpoint:
    return Endpoint()


@pytest.fixture(scope="module")
def address(serving: Serving, streamlit: Serving, engine: Endpoint) -> Iterator[str]:
    with serving(engine) as url, streamlit(f"{url}/v1") as address:
        yield address


@pytest.fixture
def opened(browser: Browser, address: str, engine: Endpoint) -> Iterator[Callable[..., Page]]:
    """Open the page anew, in a window of its own."""
    windows = []

    def visit(size: ViewportSize = DESKTOP, locale: str = "en-US") -> Page:
        windows.append(browser.new_context(viewport=size, locale=locale))
        engine.bodies.clear()
        return visited(windows[-1].new_page(), address)

    yield visit
    for window in windows:
        window.close()


def visited(page: Page, address: str) -> Page:
    page.set_default_timeout(SECONDS)
    page.goto(address)
    expect(page.get_by_test_id("stChatInputTextArea")).to_be_visible(timeout=60_000)
    return page


def ask(page: Page, text: str, place: str = "Say something…") -> None:
    box = page.get_by_placeholder(place)
    box.fill(text)
    box.press("Enter")


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def show(page: Page, mode: str) -> None:
    """Change to another mode."""
    page.get_by_role("radiogroup", name="Chat").get_by_text(mode, exact=True).click()


def slide(page: Page, label: str, presses: int) -> None:
    """Move a slider by so many steps, as the keyboard does."""
    knob = page.get_by_role("slider", name=label)
    for _ in range(abs(presses)):
        knob.press("ArrowRight" if presses > 0 else "ArrowLeft")


def answers(page: Page) -> Any:
    return page.get_by_test_id("stChatMessage")


def test_a_conversation_with_every_setting(opened: Callable[..., Page], engine: Endpoint) -> None:
    page = opened()
    choose(page, "Model", "wishes")
    page.get_by_label("System prompt").fill("Be brief.")
    slide(page, "Max tokens", -2)
    slide(page, "Temperature", 2)
    slide(page, "Top-p", -1)
    slide(page, "Repetition penalty", 3)
    ask(page, "hello")
    expect(answers(page).last).to_contain_text("wishes: **hello**")
    expect(answers(page).last).to_contain_text("2 tokens")
    expect(answers(page).last).to_contain_text("first word")
    ask(page, "again")
    expect(answers(page).last).to_contain_text("wishes: **again**")
    sent = engine.bodies[-1]
    roles = [(m["role"], m["content"]) for m in sent["messages"]]
    assert roles == [
        ("system", "Be brief."),
        ("user", "hello"),
        ("assistant", "wishes: **hello**"),
        ("user", "again"),
    ]
    assert (sent["max_tokens"], sent["temperature"], sent["top_p"]) == (510, 0.8, 0.85)
    assert sent["repetition_penalty"] == 1.15
    page.get_by_role("button", name="Clear history").click()
    expect(answers(page)).to_have_count(0)


def test_an_answer_streams_is_stopped_and_asked_again(opened: Callable[..., Page], engine: Endpoint) -> None:
    page, cut = opened(), engine.cut
    ask(page, "long")
    expect(answers(page).last).to_contain_text("word3")
    page.get_by_role("button", name="Stop").click()
    again = page.get_by_role("button", name="Regenerate")
    expect(again).to_be_visible()
    kept = answers(page).last.inner_text()
    assert "word3" in kept and "word150" not in kept
    assert engine.cut == cut + 1
    again.click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(answers(page)).to_have_count(2)
    page.get_by_role("button", name="Stop").click()
    assert [body["messages"] for body in engine.bodies] == [[{"role": "user", "content": "long"}]] * 2


@pytest.mark.slow
def test_settings_changed_while_an_answer_streams_do_not_disturb_it(
    opened: Callable[..., Page], engine: Endpoint
) -> None:
    page, cut = opened(), engine.cut
    ask(page, "long")
    expect(answers(page).last).to_contain_text("word3")
    slide(page, "Temperature", 1)
    expect(answers(page).last).to_contain_text("word25")
    assert engine.cut == cut
    page.get_by_role("button", name="Stop").click()


@pytest.mark.slow
def test_two_models_side_by_side(opened: Callable[..., Page], engine: Endpoint) -> None:
    page = opened()
    choose(page, "Side by side with", "wishes")
    ask(page, "both")
    expect(answers(page).nth(1)).to_contain_text("base: **both**")
    expect(answers(page).nth(2)).to_contain_text("wishes: **both**")
    expect(answers(page).nth(2)).to_contain_text("2 tokens")
    ask(page, "wide")
    left, right = (answers(page).nth(n).bounding_box() for n in (4, 5))
    assert left and right and abs(left["y"] - right["y"]) < 5 and right["x"] > left["x"] + left["width"] - 5
    for n in (0, 1):
        text, answer = page.locator(".said").nth(n - 2).bounding_box(), (left, right)[n]
        assert text and text["x"] + text["width"] <= answer["x"] + answer["width"]


@pytest.mark.slow
def test_a_table_of_prompts_is_answered_and_downloaded(opened: Callable[..., Page], tmp_path: Path) -> None:
    page = opened()
    show(page, "Table")
    expect(page.get_by_role("button", name="Run")).to_be_disabled()
    page.get_by_label("Prompts, one per line").fill("一\n二")
    (tmp_path / "more.csv").write_text("query\n三\n", encoding="utf-8")
    page.locator("input[type=file]").set_input_files(tmp_path / "more.csv")
    page.get_by_label("Models").click()
    page.get_by_role("option", name="wishes").click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_text("6 of 6 answered")).to_be_visible()
    downloads = {}
    for label, name in (("Download CSV", "answers.csv"), ("Download JSONL", "answers.jsonl")):
        with page.expect_download() as download:
            page.get_by_role("button", name=label).click()
        assert download.value.suggested_filename == name
        downloads[name] = Path(download.value.path()).read_text(encoding="utf-8-sig")
    rows = list(csv.DictReader(downloads["answers.csv"].splitlines()))
    assert [(row["prompt"], row["base"], row["wishes"]) for row in rows] == [
        (p, f"base: **{p}**", f"wishes: **{p}**") for p in "一二三"
    ]
    assert [json.loads(line)["prompt"] for line in downloads["answers.jsonl"].splitlines()] == ["一", "二", "三"]


@pytest.mark.slow
def test_personas_answer_each_other_in_turn_and_a_person_joins_in(
    opened: Callable[..., Page], engine: Endpoint
) -> None:
    page = opened()
    show(page, "Group")
    page.get_by_label("Who it is").first.fill("You are a poet.")
    page.get_by_label("Name").first.fill("Li")
    page.get_by_label("Name").nth(1).fill("Li")
    page.get_by_label("Name").nth(1).press("Tab")
    expect(page.get_by_text("Personas need different names")).to_be_visible()
    page.get_by_label("Name").nth(1).fill("Du")
    page.get_by_label("Name").nth(1).press("Tab")
    page.get_by_label("Rounds").fill("1")
    page.get_by_label("Rounds").press("Tab")
    ask(page, "moon", TOPIC)
    expect(answers(page)).to_have_count(3)
    expect(answers(page).nth(2)).to_contain_text("wishes: **Li: base: **You: moon****")
    assert engine.bodies[0]["messages"][0] == {"role": "system", "content": "You are a poet."}
    expect(page.get_by_role("button", name="Stop")).to_have_count(0)
    ask(page, "long live", TOPIC)
    expect(answers(page)).to_have_count(6)
    assert [m["role"] for m in engine.bodies[2]["messages"]] == ["system", "user", "assistant", "user"]
    show(page, "Chat")
    show(page, "Group")
    expect(answers(page)).to_have_count(6)
    expect(page.get_by_text("Du").first).to_be_visible()


@pytest.mark.slow
def test_the_page_speaks_the_browser_s_language_and_changes_it(opened: Callable[..., Page]) -> None:
    page = opened(locale="zh-CN")
    expect(page.get_by_role("button", name="清空历史")).to_be_visible()
    slide(page, "温度", 2)
    page.get_by_text("English", exact=True).click()
    expect(page.get_by_role("button", name="Clear history")).to_be_visible()
    expect(page.get_by_role("slider", name="Temperature")).to_have_value("0.8")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["Chat", "Table", "Group"])
def test_nothing_is_wider_than_a_phone(opened: Callable[..., Page], mode: str) -> None:
    page = opened(PHONE)
    expect(page.get_by_test_id("stSidebar")).not_to_be_in_viewport()
    page.get_by_test_id("stExpandSidebarButton").click()
    choose(page, "Side by side with", "wishes")
    show(page, mode)
    page.get_by_test_id("stSidebarCollapseButton").get_by_role("button").click()
    if mode == "Table":
        page.get_by_label("Prompts, one per line").fill("一")
        page.get_by_label("Prompts, one per line").press("Tab")
        page.get_by_role("button", name="Run").click()
        expect(page.get_by_role("button", name="Download CSV")).to_be_visible()
    else:
        ask(page, "你好，" * 40, TOPIC if mode == "Group" else "Say something…")
        expect(answers(page).nth(2)).to_contain_text("wishes")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    if mode == "Chat":
        first, second = (answers(page).nth(n).bounding_box() for n in (1, 2))
        assert first and second and second["y"] >= first["y"] + first["height"] - 5  # stacked


@pytest.mark.slow
def test_an_endpoint_that_is_not_there_is_said_and_tried_again(browser: Browser, streamlit: Serving) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    with streamlit(url) as address:
        page = browser.new_page(locale="en-US")
        page.goto(address)
        expect(page.get_by_text("is the endpoint up")).to_be_visible(timeout=60_000)
        expect(page.get_by_role("button", name="Try again")).to_be_visible()
        page.close()


TEXTS = (
    "2~3天，4~5天",
    "2*3*4 = 24, __x__ and **y**",
    ":red[红] :material/home: :smile:",
    "# not a heading",
    "床前明月光\n疑是地上霜\n  举头望明月",
    "![x](https://evil.example.org/x.png) <img src=https://evil.example.org/y.png>",
    "$a$ and $b$ <b>bold</b> &amp; <script>alert(1)</script>",
    "1. one\n\n    code",
)


def test_text_is_shown_as_it_was_said_and_nothing_is_fetched_from_elsewhere(opened: Callable[..., Page]) -> None:
    page = opened()
    foreign: list[str] = []
    page.on("request", lambda request: foreign.append(request.url) if "127.0.0.1" not in request.url else None)
    page.reload()
    expect(page.get_by_test_id("stChatInputTextArea")).to_be_visible(timeout=60_000)
    for text in TEXTS:
        ask(page, text)
        last = text.splitlines()[-1]  # what the endpoint repeats
        expect(answers(page).last).to_contain_text(f"base: **{last}**")
        said = page.locator(".said").nth(-2)
        assert said.evaluate("one => one.textContent") == text
    assert page.locator(".said :is(img, b, h1, code, script, a)").count() == 0
    assert [url for url in foreign if not url.startswith(("data:", "blob:"))] == []


@pytest.mark.slow
def test_a_conversation_outlives_its_endpoint_and_what_was_typed_stays(
    browser: Browser, serving: Serving, streamlit: Serving
) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(serving(Endpoint()))
        with streamlit(f"{url}/v1") as address:
            page = visited(browser.new_page(locale="zh-CN"), address)
            ask(page, "你好", "说点什么……")
            expect(answers(page).last).to_contain_text("base: **你好**")
            stack.close()
            time.sleep(4)  # until the list of models is asked for again
            ask(page, "还在吗", "说点什么……")
            expect(answers(page).last).to_contain_text("连接不上")
            expect(page.get_by_text("你好", exact=True).first).to_be_visible()
            expect(page.get_by_text("还在吗").first).to_be_visible()
            expect(page.get_by_role("button", name="重新生成")).to_be_visible()
            page.close()


@pytest.mark.slow
def test_a_page_with_a_password_shows_nothing_before_it(
    browser: Browser, serving: Serving, streamlit: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANLU_UI_PASSWORD", "open sesame")
    with serving(Endpoint()) as url, streamlit(f"{url}/v1") as address:
        page = browser.new_page(locale="en-US")
        page.goto(address)
        box = page.get_by_label("Password")
        expect(box).to_be_visible(timeout=60_000)
        expect(page.get_by_test_id("stChatInputTextArea")).to_have_count(0)
        box.fill("guess")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_text("The password is wrong")).to_be_visible()
        box.fill("open sesame")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_test_id("stChatInputTextArea")).to_be_visible()
        page.close()


def discuss_with_markers(page: Page) -> None:
    """Three personas, two of whom have adapters with a marker each."""
    show(page, "Group")
    for n, name in enumerate(("red", "blue")):
        page.get_by_test_id("stMainBlockContainer").get_by_label("Model", exact=True).nth(n).click()
        page.get_by_role("option", name=name, exact=True).click()
    for label, value in (("Name", "Li"), ("Who it is", "You are a poet."), ("How many", "3"), ("Rounds", "1")):
        page.get_by_label(label).first.fill(value)
        page.get_by_label(label).first.press("Tab")
    expect(page.get_by_label("Name")).to_have_count(3)
    ask(page, "hi", TOPIC)
    expect(answers(page)).to_have_count(4)
    expect(answers(page).nth(1)).to_contain_text("Li")
    expect(answers(page).nth(2)).to_contain_text("BBBB")


def fill_a_table_with_markers(page: Page, folder: Path) -> None:
    """Prompts from the box and from a file, answered by two models and downloaded."""
    show(page, "Table")
    page.get_by_label("Prompts, one per line").fill("a\nb\nc")
    (folder / "more.txt").write_text("d\n", encoding="utf-8")
    page.locator("input[type=file]").set_input_files(folder / "more.txt")
    page.get_by_label("Models").click()
    page.get_by_role("option", name="red").click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_text("8 of 8 answered")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download JSONL").click()
    rows = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list("abcd")
    assert all(row["red"].startswith("RRRR") for row in rows)


@pytest.mark.slow
def test_every_mode_before_the_real_endpoint(
    browser: Browser,
    streamlit: Serving,
    ray_cluster: None,
    tiny_model: Path,
    marker_adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    pytest.importorskip("vllm")
    from pipelines.models.served import ServedModel
    from pipelines.recipe.serve import Engine, Serve
    from serve.app import endpoint

    section = Serve(engine=Engine(max_model_len=1024, kv_cache_memory_bytes=64 << 20))
    models = [ServedModel("base", str(tiny_model), {name: str(path) for name, path in marker_adapters.items()})]
    with endpoint(models, section, log_dir=tmp_path) as url, streamlit(url) as address:
        page = visited(browser.new_page(locale="en-US"), address)
        choose(page, "Model", "red")  # first: a slider's redrawing closes an open list
        choose(page, "Side by side with", "blue")
        page.get_by_label("System prompt").fill("x")
        slide(page, "Temperature", -14)
        slide(page, "Top-p", -2)
        slide(page, "Repetition penalty", 1)
        ask(page, "hello")
        expect(answers(page).nth(1)).to_contain_text("RRRRRRRR")
        expect(answers(page).nth(2)).to_contain_text("BBBBBBBB")
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Regenerate").click()
        expect(answers(page).nth(2)).to_contain_text("BBBBBBBB")
        page.get_by_role("button", name="Clear history").click()
        expect(answers(page)).to_have_count(0)
        page.get_by_role("slider", name="Max tokens").press("Home")
        slide(page, "Max tokens", 14)
        discuss_with_markers(page)
        fill_a_table_with_markers(page, tmp_path)
        page.get_by_text("中文", exact=True).click()
        expect(page.get_by_role("button", name="清空历史")).to_be_visible()
        page.close()
