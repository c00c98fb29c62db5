"""The page of ``fgsteer play`` in Chromium, headless: what a person does there, and what nobody may.

PLAY_SHOTS=FOLDER keeps pictures of the page there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

import fgsteer as fg
from fgsteer.play.served import SteeringServer
from fgsteer.play.session import PlaySession, sae_sources

pytestmark = pytest.mark.play
playwright = pytest.importorskip("playwright.sync_api", reason="make test-play installs it")
pytest.importorskip("uvicorn", reason="make test-play installs it")

from fgsteer.play.web import serve_page
from fgsteer.steering.streaming import stream_tokens

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "chromium"
SAE, FEATURE, HOSTILE = "layer_2", 2326, 3044
SCRIPT = "<img src=x onerror='document.title=1'><script>document.title=1</script>"
PATIENCE = 120_000  # milliseconds: machines differ
WRITTEN = "#judging:not([hidden])"


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    model, tokenizer = fg.load_model("default", device="cpu")
    sources, first = sae_sources("default", None, [])
    sae = fg.load_sae("default", SAE)
    sae = dataclasses.replace(sae, labels={**sae.labels, HOSTILE: f"sea {SCRIPT}"})
    return PlaySession(model, tokenizer, "default", sources, saes={SAE: sae}, first_sae=first,
                       folder=tmp_path_factory.mktemp("vectors"))  # fmt: skip


@pytest.fixture(scope="module")
def address(session):
    """Where the page is, with its token."""
    told, ready = [], threading.Event()

    def note(url):
        told.append(url)
        ready.set()

    threading.Thread(target=serve_page, args=(session, "token-of-the-test", 0, note), daemon=True).start()
    assert ready.wait(60)
    return told[0]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], headless=True)
        yield launched
        launched.close()


@pytest.fixture
def opened(browser, address):
    """Opens the page as a person would; afterwards nothing was asked of elsewhere, and the console is clean."""
    complaints, contexts = [], []
    origin = address.partition("/?")[0]

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1360, "height": 900}, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith((origin, "blob:")) or complaints.append(asked.url))
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        page.fill("#tokens", "12")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def until(page, expression):
    """Wait until an expression holds; the page's policy forbids that the browser itself polls a text of code."""
    for _ in range(PATIENCE // 100):
        if page.evaluate(expression):
            return
        time.sleep(0.1)
    raise AssertionError(expression)


def shot(page, name):
    if folder := os.environ.get("PLAY_SHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def find_and_add(page, word="sea"):
    page.fill("#word", word)
    page.press("#word", "Enter")
    page.wait_for_selector("#found li .primary")
    page.click(f"#found button[aria-label^='Add feature {FEATURE},']")
    page.wait_for_selector(WRITTEN)
    page.wait_for_selector("#take:not([hidden])")


def steered(page):
    return page.inner_text(".text.steered .body")


def test_search_add_slide_write_compare(opened):
    page = opened()
    assert "token" not in page.url
    shot(page, "first")
    page.fill("#word", "sea")
    page.click("#search button")
    page.wait_for_selector("#found li .name")
    page.click("#found li:first-child .name")
    page.wait_for_selector("#found .facts q")
    assert "water" in page.inner_text("#found .facts")
    shot(page, "found")
    find_and_add(page)
    assert re.search(r"costs about (0\.9\d*|1) nats", page.inner_text("#items")), "the end of the green zone"
    assert page.locator("#items .warn, #items .bad").count() == 0
    assert "nats a token of neutral text" in page.inner_text("#cost")
    first = steered(page)
    assert first.startswith("She looked out of the window and")
    unsteered = page.inner_text(".text.unsteered .body")
    assert unsteered != first

    slider = page.locator("#items input[type=range]")
    slider.fill("0.9")
    assert "0.90" in page.inner_text("#items output")
    page.wait_for_selector(WRITTEN, state="hidden")
    page.wait_for_selector(WRITTEN)
    assert steered(page) != first
    assert page.inner_text(".text.unsteered .body") == unsteered

    page.hover(".text.steered .t:nth-child(3)")
    page.wait_for_selector("#inspector .top")
    assert "KL" in page.inner_text("#inspector")
    colors = page.locator("#color option").all_inner_texts()
    assert any(f"feature {FEATURE}" in color for color in colors)
    page.select_option("#color", "f0")
    assert page.locator("#texts .s1, #texts .s2, #texts .s3, #texts .s4, #texts .s5").count() > 0
    assert str(FEATURE) in page.inner_text("#moved-rows")
    assert "predicted" in page.inner_text("#moved-rows thead")
    page.check("#control")
    page.wait_for_selector(".text.random .t")
    page.wait_for_selector(WRITTEN)
    page.fill("#seeds", "2")
    page.press("#seeds", "Tab")
    page.wait_for_selector(".text.random[data-seed='1'] .t")
    page.wait_for_selector(WRITTEN)
    until(page, "document.querySelector('#code').textContent.includes('for seed in [0, 1]')")
    assert page.locator("#texts article").count() == 6
    shot(page, "compared")
    page.click("#judge")
    page.wait_for_selector("#scores p")
    assert "coherence" in page.inner_text("#scores")


def test_edits_gates_and_scopes_of_an_item(opened):
    page = opened()
    find_and_add(page)
    page.click("#items summary")
    page.check("#items input[aria-label='Only while a feature fires']")
    page.wait_for_selector('#items input[aria-label="The gate\'s threshold"]')
    page.wait_for_selector(WRITTEN)
    until(page, "document.querySelector('#code').textContent.includes('when=fg.Feature')")
    assert "gate" in page.locator("#color option").all_inner_texts()
    page.select_option("#items select[aria-label='Tokens that are steered']", "generated")
    page.select_option("#items select[aria-label='What it does']", "edit:off")
    until(page, "document.querySelector('#code').textContent.includes(\"'off'\")")
    assert "scope='generated'" in page.inner_text("#code")
    page.wait_for_selector(WRITTEN)


def test_a_contrast_is_built(opened):
    page = opened()
    page.click("#contrast summary")
    page.select_option("#example", "sea")
    until(page, "document.querySelector('#positives').value.length > 50")
    page.select_option("#method", "caa")
    page.select_option("#layer", "3")
    page.click("#contrast .primary")
    page.wait_for_selector(WRITTEN)
    until(page, "document.querySelector('#code').textContent.includes('fg.caa(stats, hookpoint=3)')")


def test_save_share_and_open_again(opened, session, tmp_path):
    page = opened()
    find_and_add(page)
    page.fill("#prompt", "At dawn")
    page.press("#prompt", "Tab")
    until(page, "document.querySelector('#code').textContent.includes('At dawn')")
    page.wait_for_selector(WRITTEN)
    text = steered(page)
    page.on("dialog", lambda dialog: dialog.accept("wave"))
    page.click("#items summary")
    with page.expect_download() as download:
        page.click("#items button:has-text('Save the vector')")
    download.value.save_as(tmp_path / "wave.safetensors")
    assert fg.SteeringVector.load(tmp_path / "wave.safetensors").features == {FEATURE: 1.0}
    assert (session.folder / "wave.safetensors").is_file()
    files = {}
    for button in ("#share", "#page", "#steering"):
        with page.expect_download() as download:
            page.click(button)
        files[button] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[button])
    assert len(fg.load_steering(files["#steering"])) == 1
    html = files["#page"].read_text(encoding="utf-8")
    assert "<script" not in html
    assert "At dawn" in html

    again = opened()
    again.set_input_files("#open-file", files["#share"])
    again.wait_for_selector(WRITTEN)
    assert again.input_value("#prompt") == "At dawn"
    assert steered(again) == text
    again.click("#saved summary")
    assert "wave" in again.locator("#vector option").all_inner_texts()
    again.select_option("#vector", "wave")
    again.click("#add-vector")
    until(again, "document.querySelectorAll('#items > li').length === 2")
    again.wait_for_selector(WRITTEN)
    again.click("#forget-vector")
    until(again, "document.querySelectorAll('#items > li').length === 1")
    assert "wave" not in again.locator("#vector option").all_inner_texts()
    assert (session.folder / "wave.safetensors").is_file()
    again.wait_for_selector(WRITTEN)
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps({**json.loads(files["#share"].read_text()), "plan": {"items": [{"kind": SCRIPT}]}}))
    again.set_input_files("#open-file", damaged)
    again.wait_for_selector("#error:not([hidden])")
    assert "kind of an item" in again.inner_text("#error")
    assert again.title() == "fgsteer play"


def test_a_server_that_is_down_is_said_in_words(opened, session, monkeypatch):
    monkeypatch.setattr(session, "server", SteeringServer("http://127.0.0.1:9"))
    page = opened()
    assert page.inner_text("#server") == "written by http://127.0.0.1:9"
    page.fill("#prompt", "A prompt that nothing has been written for")
    page.click("#write")
    page.wait_for_selector("#error:not([hidden])")
    assert "Expected a running fgsteer serve" in page.inner_text("#error")
    assert page.inner_text("#status") == ""


def test_by_keyboard_alone(opened):
    page = opened()
    assert page.evaluate("document.activeElement.id") in ("word", "tokens")
    page.focus("#word")
    page.keyboard.type("sea")
    page.keyboard.press("Enter")
    page.wait_for_selector("#found li .primary")
    for _ in range(6):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Add":
            break
    page.keyboard.press("Enter")
    until(page, "document.activeElement.type === 'range'")
    page.wait_for_selector(WRITTEN)
    before = page.inner_text("#items output")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    until(page, f"document.querySelector('#items output').textContent !== {before!r}")
    time.sleep(0.5)  # longer than the page waits for a further change before it writes
    until(page, "document.querySelector('#status').textContent === ''")
    page.focus(".text.steered .t")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.previousElementSibling.className.includes('t')")
    assert page.inner_text("#inspector")


def test_a_narrow_screen_and_dark_mode(opened):
    page = opened(viewport={"width": 390, "height": 800}, color_scheme="dark")
    find_and_add(page)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 22, 21)"
    shot(page, "narrow-dark")
    page.set_viewport_size({"width": 1360, "height": 900})
    shot(page, "dark")


def test_texts_of_strangers_are_shown_and_not_obeyed(opened):
    page = opened()
    page.fill("#word", "sea")
    page.press("#word", "Enter")
    page.wait_for_selector("#found li .name")
    row = page.locator(f"#found li:has(button[aria-label^='Add feature {HOSTILE}'])")
    assert "<script>" in row.inner_text()
    page.fill("#prompt", SCRIPT)
    row.locator(".primary").click()
    page.wait_for_selector(WRITTEN)
    assert "<img" in page.inner_text(".text.steered .body")
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "fgsteer play"


def test_a_queue_shows_its_place_and_a_closed_tab_ends_its_text(opened, session, monkeypatch):
    real = stream_tokens

    def slow(*arguments, **options):
        """A long text that takes its time, on any machine and past its end."""
        with closing(real(*arguments, **options)) as generated:
            for tokens in generated:
                time.sleep(0.02)
                yield tokens
        while options["max_new_tokens"] == 512:
            time.sleep(0.02)
            yield []

    monkeypatch.setattr("fgsteer.play.writing.stream_tokens", slow)
    first, second = opened(), opened()
    first.fill("#tokens", "512")
    first.fill("#temperature", "0")
    first.click("#write")
    until(first, "document.querySelector('#texts .body')?.textContent.length > 60")
    second.click("#write")
    until(second, "/waiting, place [1-9]/.test(document.querySelector('#status').textContent)")
    first.close()
    second.wait_for_selector(WRITTEN)  # its turn came
    assert not any(module._forward_hooks for module in session.model.modules())
    second.fill("#tokens", "512")
    second.click("#write")
    until(second, "document.querySelector('#texts .writing')?.textContent.length > 60")
    second.click("#stop")
    for _ in range(100):
        if not [thread for thread in threading.enumerate() if thread.name == "fgsteer.stream"]:
            break
        time.sleep(0.1)
    assert not [thread for thread in threading.enumerate() if thread.name == "fgsteer.stream"]


def status_of(url, body=None, **headers):
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_nobody_else_is_answered(address):
    base, _, token = address.partition("/?token=")
    json_type = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    assert status_of(address) == 200
    assert status_of(base) == 401
    assert status_of(f"{base}/static/app.js") == 401
    assert status_of(f"{base}/api/about", b"{}", **json_type) == 200
    assert status_of(f"{base}/api/about", b"{}", **json_type, Origin="http://evil.example") == 403
    assert status_of(f"{base}/api/about", b"{}", **json_type, Host="evil.example") == 403
    assert status_of(f"{base}/api/about", b"[]", **json_type) == 400
    assert status_of(f"{base}/api/about", b"{" * 100, **json_type) == 400
    assert status_of(f"{base}/api/__init__", b"{}", **json_type) == 404
    assert status_of(f"{base}/static/..%2fplan.py?token={token}") == 404
