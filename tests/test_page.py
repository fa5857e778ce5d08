"""The page in a browser, against a server that speaks its protocol."""

import contextlib
import json
import queue
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources

import pytest

from dspark_jax import Request
from tests.small_server import NAME, SAY, listening, load_tiny, made_service

PAGE = resources.files("dspark_jax.serving").joinpath("page.html").read_text(encoding="utf-8")
NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
# When the answer is there: look at the last round by the keyboard, and tell what the page says.
REPORT = """
const watch = setInterval(() => {
  if (document.getElementById("talk").ariaBusy !== "false") return;
  clearInterval(watch);
  const turn = [...document.querySelectorAll(".turn")].at(-1);
  turn.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft", bubbles: true}));
  const spans = [...turn.children].map((span) => [
    span.textContent, Number(span.style.getPropertyValue("--place")), Number(span.dataset.round)]);
  const told = Object.fromEntries(["length", "count", "detail", "error", "model"].map(
    (id) => [id, document.getElementById(id).textContent]));
  const images = document.querySelectorAll("b, img").length;
  fetch("/done", {method: "POST", body: JSON.stringify({spans, images, ...told})});
}, 20);
"""
EVIL = "<b>bold</b><img src=x onerror=alert(1)>"


def a_round(drafts, verified, accepted, tokens):
    sure = [0.9 - 0.1 * place for place, _ in enumerate(drafts)]
    return {
        "drafts": drafts, "verified": verified, "accepted": accepted, "tokens": tokens,
        "confidences": sure, "rows": verified + 1, "seconds": 0.01,
    }  # fmt: skip


# A character of two tokens, a token that is not shown, and text that is no markup.
PIECES = [
    ("Sky", [a_round([], 0, 0, ["Sky"])]),
    (" is", [a_round([" is", "\ufffd", "x"], 2, 2, [" is", "\ufffd", "\ufffd"])]),
    ("é" + EVIL, [a_round([EVIL, "no", "never"], 2, 1, [EVIL, "<end>"])]),
]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def _send(self, raw, kind="application/json"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self):
        if self.path == "/v1/models":
            self._send(b'{"data": [{"id": "tiny"}]}')
        else:
            page = PAGE.replace("</script>\n</body>", REPORT + "</script>\n</body>")
            self._send(page.encode(), "text/html; charset=utf-8")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.heard.put((self.path, body))
        if self.path == "/done":
            self._send(b"{}")
            return
        said = b""
        for text, rounds in PIECES:
            load = {"rounds": rounds, "running": 2, "waiting": 1}
            event = {"choices": [{"delta": {"content": text}}], "dspark": load}
            said += b"data: " + json.dumps(event).encode() + b"\n\n"
        self._send(said + b"data: [DONE]\n\n", "text/event-stream")


@contextlib.contextmanager
def browsing(folder, url):
    """A browser that looks at a page."""
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    words += ["--remote-debugging-port=0"]  # or it ends once the page is loaded
    browser = subprocess.Popen([BROWSER, *words, url], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        browser.kill()
        browser.wait()


needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no browser here")


@pytest.mark.full
@needs_browser
def test_a_browser_shows_how_each_token_came(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.heard = queue.Queue()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with browsing(tmp_path, f"http://127.0.0.1:{server.server_port}/?prompt=Why%3F"):
            path, asked = server.heard.get(timeout=60)
            _, told = server.heard.get(timeout=60)
    finally:
        server.shutdown()
        server.server_close()
    assert path == "/v1/chat/completions"
    assert asked["messages"] == [{"role": "user", "content": "Why?"}]
    assert (asked["model"], asked["stream"], asked["dspark"]) == ("tiny", True, True)
    # The accented letter goes with the round of its bytes; nothing became markup.
    assert told["spans"] == [["Sky", 0, 0], [" is", 1, 1], ["é", 2, 1], [EVIL, 1, 2]]
    assert told["images"] == 0
    assert (told["length"], told["count"], told["model"]) == ("2.50", "3", "tiny")
    assert told["detail"].startswith("Round 3: 1 accepted of 2 verified of 3 drafts; 3 rows")
    assert "no0.80" in told["detail"]
    assert told["error"] == ""


class Telling:
    """The server's application with a page that tells what it shows, which ``heard`` gets."""

    def __init__(self, app):
        self._app, self.heard = app, queue.Queue()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] not in ("/", "/done"):
            await self._app(scope, receive, send)
            return
        if scope["path"] == "/done":
            raw = b""
            while (message := await receive()).get("body") and message["type"] == "http.request":
                raw += message["body"]
                if not message["more_body"]:
                    break
            self.heard.put(json.loads(raw))

        async def sending(message):
            if message["type"] == "http.response.start":
                kept = [one for one in message["headers"] if one[0] != b"content-length"]
                message = {**message, "headers": kept}
            elif scope["path"] == "/":
                end = b"</script>\n</body>"
                body = message["body"].replace(end, REPORT.encode() + end)
                message = {**message, "body": body}
            await send(message)

        await self._app(scope, receive, sending)


@pytest.mark.full
@needs_browser
def test_a_browser_shows_what_the_server_says(tmp_path):
    model = load_tiny(tmp_path)
    with made_service(model, positions=400, position_buckets=(512,)) as service:
        service.app = telling = Telling(service.app)
        with (
            listening(service) as address,
            browsing(tmp_path / "browser", f"{address}/?prompt=say%20it"),
        ):
            told = telling.heard.get(timeout=120)
        request = Request(messages=SAY, max_new_tokens=256)
        expected = service.served.engine.submit(request).wait()
    assert told["error"] == ""
    assert told["model"] == NAME
    assert "".join(text for text, _, _ in told["spans"]) == expected.text
    accepted = sum(drafts for drafts in expected.accepted_drafts)
    drafted = sum(place > 0 for _, place, _ in told["spans"])
    assert accepted - 3 <= drafted <= accepted  # those of the last round may be cut
    assert told["count"] == str(expected.rounds + 1)
    assert float(told["length"]) == pytest.approx(expected.accepted_length, abs=0.1)


def test_the_page_needs_nobody_else():
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)|@import|url\(|https?:", PAGE)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", PAGE)
    assert len(PAGE.splitlines()) < 400
