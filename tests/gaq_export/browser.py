"""A page as a browser sees it: Chromium without a window, if there is one."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# The page in a frame of a given width, and then, as text, what became of it.
_FRAME = """<!DOCTYPE html><body><iframe id="frame" style="width: {width}px; height: 800px" srcdoc="{page}"></iframe>
<pre id="found"></pre><script>
document.getElementById("frame").onload = () => {{
  const page = document.getElementById("frame").contentDocument;
  const seen = (tag) => [...page.querySelectorAll(tag)].filter((each) => each.getBoundingClientRect().height > 20);
  document.getElementById("found").textContent = JSON.stringify({{
    images: seen("img").filter((image) => image.naturalWidth > 0).length,
    figures: seen("svg").length,
    width: page.documentElement.scrollWidth,
    paper: getComputedStyle(page.body, null).backgroundColor,
    ink: getComputedStyle(page.body, null).color,
  }});
}};
</script></body>"""


def look(page: str, folder: Path, *, width: int, dark: bool = False) -> dict[str, Any]:
    """Return what is to be seen of the page in a window of `width` pixels, and what the browser complained of."""
    assert CHROMIUM is not None
    frame = folder / "frame.html"
    frame.write_text(_FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={folder}/user",
    ]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [CHROMIUM, *options, "--virtual-time-budget=10000", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found is not None, done.stderr
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen | {"complaints": re.findall(r".*CONSOLE.*", done.stderr)}
