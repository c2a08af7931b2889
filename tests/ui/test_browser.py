"""The page in a real browser, Debian's chromium: what somebody sees and does there."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.support.commands import environment

CHROMIUM = "/usr/bin/chromium"
ORDER = ("base", "expert-a", "expert-b", "merged")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.browser


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(*line, folder, **changes):
    """A server in a process of its own; (process, address) once it says that it listens."""
    process = subprocess.Popen(
        [sys.executable, *map(str, line)],
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT), **changes),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


@pytest.fixture(scope="module")
def server(models):
    with running("-m", "neuron_methods", "ui", "--no-browser", "--port", free_port(), folder=models) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def page(server, browser):
    """The page, opened once; and nothing but itself was asked for anything."""
    found = browser.new_page(viewport={"width": 1400, "height": 1000})
    found.set_default_timeout(60_000)
    asked = []
    found.on("request", lambda request: asked.append(request.url))
    found.goto(server[1])
    found.locator("#base textarea").wait_for()
    yield found
    assert asked and all(url.startswith((server[1], "data:", "blob:", "about:")) for url in asked)


def told(page, text):
    """What the page says of a job, once `text` is in it."""
    page.locator("#told").get_by_text(re.compile(text)).first.wait_for()
    return page.locator("#told").inner_text()


def test_two_experts_are_chosen_and_checked_as_they_are_typed(page):
    page.locator("#base textarea").fill("base")
    page.locator("#experts textarea").fill("expert-a\n./nope")
    page.locator("#found").get_by_text("✗ expert 2: ./nope: no such directory").wait_for()
    page.locator("#experts textarea").fill("expert-a\nexpert-b")
    page.locator("#found").get_by_text("✓ expert 2: LlamaForCausalLM").wait_for()
    # By keyboard alone: open the list, write, choose.
    page.locator("#method input").focus()
    page.keyboard.type("neuro_merg")
    page.keyboard.press("Enter")
    page.locator("#parameter-density textarea").fill("0.2, 0.3")
    page.locator("#yaml-found").get_by_text("reads as neuro_merging of 2 models").wait_for()
    page.wait_for_function("document.querySelector('#yaml textarea').value.includes('0.3')")
    assert yaml.safe_load(page.locator("#yaml textarea").input_value()) == {
        "merge_method": "neuro_merging",
        "base_model": "base",
        "models": [
            {"model": "expert-a", "parameters": {"density": 0.2}},
            {"model": "expert-b", "parameters": {"density": 0.3}},
        ],
    }


def test_a_dry_run_shows_the_plan_and_writes_nothing(page, models):
    before = sorted(os.listdir(models))
    text = page.locator("#yaml textarea").input_value()
    page.locator("#parameter-profile textarea").focus()
    for _ in range(15):  # past recipes, YAML and output, of which nothing changes
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "plan":
            break
    page.keyboard.press("Enter")
    assert "in all: 20 tensors" in told(page, "plan: done")
    assert page.locator("#yaml textarea").input_value() == text
    assert sorted(os.listdir(models)) == before


def test_what_is_typed_into_the_yaml_is_what_runs_and_what_is_wrong_there_is_one_line(page, models):
    text = page.locator("#yaml textarea").input_value()
    before = sorted(os.listdir(models))
    page.locator("#yaml textarea").fill(text.replace("expert-b", "./nope"))
    page.locator("#merge").click()
    page.locator("#told [role=alert]").wait_for()
    line = "model ./nope: no such directory; check the path (see: mergekit-neuron help models)"
    assert told(page, "no such directory").strip() == line
    assert page.locator("#experts textarea").input_value() == "expert-a\n./nope"
    assert sorted(os.listdir(models)) == before
    page.locator("#yaml textarea").fill(text)


def test_a_merge_is_made_and_its_report_is_read(page, models):
    page.locator("#out textarea, #out input").first.fill("merged")
    page.locator("#merge").click()
    assert "complete and verified: merged" in told(page, "merge: done")
    heading = page.frame_locator("#drawn iframe >> visible=true").locator("h1")
    assert heading.inner_text() == "merged: what the merge does to the neurons"
    recorded = yaml.safe_load((models / "merged/mergekit_config.yml").read_text())
    assert recorded["models"][1]["parameters"] == {"density": 0.3}


def test_base_experts_and_merge_are_asked_side_by_side(page):
    page.locator("#prompt textarea").fill("one")
    page.locator("#ask").click()
    page.locator("#tried").get_by_text("answers: done").wait_for()
    said = page.locator("#tried pre").inner_text().split("\n")
    assert [line for line in said if not line.startswith("  ")] == [f"{m}: one" for m in ORDER]
    assert sum(line.startswith("  answer:") for line in said) == len(ORDER)


def test_a_push_that_cannot_be_is_one_line(page):
    page.locator("#repository textarea, #repository input").first.fill("no id")
    page.locator("#push").click()
    page.locator("#pushed [role=alert]").get_by_text("no id: no id of a repository").wait_for()


def wait_until(found):
    """What `found` finds, as soon as it does; for a minute."""
    end = time.monotonic() + 60
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.002)
    return value


def test_a_merge_that_is_cancelled_half_way_leaves_nothing(page, models):
    before = sorted(os.listdir(models))
    page.locator("#out textarea, #out input").first.fill("cancelled")
    page.locator("#merge").click()
    wait_until((models / ".cancelled.unfinished").exists)
    process = int((models / ".cancelled.lock").read_text().split()[1])
    os.kill(process, signal.SIGSTOP)  # half-way it is, until it is told to end
    page.locator("#cancel:enabled").click()
    pending = re.compile(r"^ShdPnd:\s+\w*[4-7c-f]\w{3}$", re.M)  # SIGTERM, the 15th
    wait_until(lambda: pending.search(Path(f"/proc/{process}/status").read_text()))
    os.kill(process, signal.SIGCONT)
    assert told(page, "cancelled").strip() == "merge: cancelled; nothing is left of it"
    assert sorted(os.listdir(models)) == before
    page.locator("#merge:enabled").wait_for()


def test_the_space_starts_as_it_is_and_reads_nothing_outside_of_its_directory(browser, models, tmp_path):
    port = free_port()
    app = ROOT / "examples/space/app.py"
    with running(app, folder=tmp_path, GRADIO_SERVER_PORT=str(port)):
        found = browser.new_page(viewport={"width": 400, "height": 800})
        found.goto(f"http://127.0.0.1:{port}/?__theme=dark")
        found.locator("#base textarea").fill(str(models / "base"))
        found.locator("#found").get_by_text("is outside of the page's directory").wait_for()
        assert found.evaluate("document.documentElement.scrollWidth") <= 400
        assert found.locator("#plan, #merge, #pause, #cancel").all_inner_texts() == [
            "Dry run",
            "Merge",
            "Pause",
            "Cancel",
        ]
        found.locator("#yaml textarea").fill(f"merge_method: linear\nmodels: [model: {models}/base]")
        found.locator("#plan").click()
        assert "is outside of the page's directory" in told(found, "outside")
