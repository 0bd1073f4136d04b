"""The search of the site answers a newcomer's questions, in a browser.

    sphinx-build docs docs/_build/html && pytest tests/test_site_search.py

It needs the built site, selenium, and Chromium with its driver. It is skipped where one is missing.
"""

import functools
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"
# A question as it is typed into the search field, and the page that answers it.
QUESTIONS = {
    "change rank": "howto/rules.html",
    "learning rate": "howto/choose.html",
    "serve adapters": "serving.html",
    "resume a run": "howto/resume.html",
    "NaN": "start/faq.html",
    "install GPU": "start/install.html",
    "several devices": "howto/meshes.html",
    "accumulate gradients": "howto/accumulation.html",
    "quantized base": "howto/quantized.html",
    "classifier head": "howto/head.html",
}

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
waits = pytest.importorskip("selenium.webdriver.support.wait")
if not (SITE / "searchindex.js").exists():
    pytest.skip("the site is not built (see above)", allow_module_level=True)
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("Chromium or its driver is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def address():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer_is_among_the_first_three(question, address, browser):
    browser.get(f"{address}/search.html?q={question.replace(' ', '+')}")
    waiting = waits.WebDriverWait(browser, 20)
    # The hits appear one by one.
    summary = lambda driver: driver.find_element("css selector", "#search-results .search-summary")
    waiting.until(lambda driver: "found" in summary(driver).text)
    links = browser.find_elements("css selector", "#search-results ul.search li a")
    hits = [link.get_attribute("href") for link in links]
    pages = list(dict.fromkeys(hit.split("?")[0].split("#")[0] for hit in hits))
    assert f"{address}/{QUESTIONS[question]}" in pages[:3], pages[:5]


def test_the_pages_ask_no_other_host(address, browser):
    browser.get_log("performance")
    for page in ("index", "start/concepts", "algorithm", "api/optimizers"):
        browser.get(f"{address}/{page}.html")
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert len(urls) > 20
    assert [url for url in urls if not url.startswith((address, "data:", "chrome"))] == []
