"""The chat page in a real browser. Needs chromium and node: `make test-page`; pictures are left in out/page."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT, Served

pytestmark = pytest.mark.browser


def test_send_stream_stop_and_a_narrow_screen(bundles):
    folder = ROOT / "out" / "page"
    folder.mkdir(parents=True, exist_ok=True)
    server = Served(bundles / "gguf")
    try:
        command = [
            "node",
            "--experimental-websocket",
            Path(__file__).with_name("drive_page.mjs"),
            shutil.which("chromium"),
        ]
        done = subprocess.run(
            [*command, f"http://127.0.0.1:{server.port}/", folder],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.strip().splitlines()
        report = json.loads(line)
        assert report["title"] == "gguf" and report["first"]
        assert "tokens/s" in report["note"]
        assert report["button"] == "Stop" and "stopped" in report["stopped"]
        assert report["markup"] == 0, "what was typed became markup"
        assert not report["wider"], "the page scrolls sideways on a phone"
        assert report["after"] == 0
        assert server.metric("phi_requests_inside") == 0
    finally:
        server.close()
