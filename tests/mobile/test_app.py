"""The app, as far as Linux sees it: its Xcode project, its property lists, and its types against stubs."""

import json
import plistlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pbxproj import XcodeProject
from swift_here import ROOT, call, swift

from phi_bench.collect import drawn
from phi_runtime.files import cache_folder
from phi_runtime.version import __version__

APP = ROOT / "mobile/App"
PROJECT = APP / "PhiApp.xcodeproj/project.pbxproj"


def test_the_project_is_well_formed():
    """kin knows Xcode's grammar, pbxproj its objects: every reference leads somewhere."""
    done = subprocess.run([Path(sys.executable).with_name("kin"), PROJECT], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "CORRECT" in done.stdout, done.stdout
    project = XcodeProject.load(str(PROJECT))
    assert project.objectVersion == "77"
    text = PROJECT.read_text()
    defined = set(re.findall(r"^\t\t([0-9A-F]{24})[^=]* = \{", text, re.MULTILINE))
    assert set(re.findall(r"\b[0-9A-F]{24}\b", text)) == defined
    for setting in ("IPHONEOS_DEPLOYMENT_TARGET = 18.0", "SWIFT_VERSION = 6.0", f"MARKETING_VERSION = {__version__}"):
        assert text.count(f"{setting};") == 2
    assert (APP / "PhiApp/Info.plist").is_file() and text.count("INFOPLIST_FILE = PhiApp/Info.plist;") == 2


@pytest.mark.swift
def test_the_package_has_what_the_project_wants():
    found = json.loads(swift("swift", "package", "dump-package", PHI_MANIFEST_FOR="apple"))
    wanted = set(re.findall(r"productName = (Phi(?!App;)\w+);", PROJECT.read_text()))
    assert wanted <= {p["name"] for p in found["products"]}
    assert {"platformName": "ios", "version": "18.0", "options": []} in found["platforms"]
    (reference,) = re.findall(r"relativePath = (\S+);", PROJECT.read_text())
    assert (APP / reference).resolve() == ROOT


def test_the_property_lists():
    info = plistlib.loads((APP / "PhiApp/Info.plist").read_bytes())
    (schemes,) = [t["CFBundleURLSchemes"] for t in info["CFBundleURLTypes"]]
    assert schemes == [drawn("127.0.0.1", 1, "0123abcd")[1].split(":")[0]]
    assert info["UIFileSharingEnabled"] and info["LSSupportsOpeningDocumentsInPlace"]
    assert info["NSAppTransportSecurity"] == {"NSAllowsLocalNetworking": True}
    assert info["NSLocalNetworkUsageDescription"]
    privacy = plistlib.loads((APP / "PhiApp/PrivacyInfo.xcprivacy").read_bytes())
    assert privacy["NSPrivacyTracking"] is False and privacy["NSPrivacyCollectedDataTypes"] == []
    used = {t["NSPrivacyAccessedAPIType"] for t in privacy["NSPrivacyAccessedAPITypes"]}
    sources = "".join(p.read_text() for p in (ROOT / "mobile/Sources").rglob("*.swift"))
    assert ("systemFreeSize" in sources) == any(t.endswith("DiskSpace") for t in used)


@pytest.mark.swift
@pytest.mark.timeout(600)
def test_types_against_stubs():
    done = subprocess.run(
        [sys.executable, ROOT / "tools/typecheck_app.py"], capture_output=True, text=True, check=False
    )
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0 and "checked" in done.stdout, (done.stdout + done.stderr)[-4000:]


def test_every_stub_names_its_page():
    """A stub proves nothing unless it was taken from somewhere: each framework's file says from where."""
    for path in (ROOT / "mobile/Stubs").glob("*.swift"):
        assert "developer.apple.com/documentation" in path.read_text(), path.name


@pytest.mark.swift
def test_progress_does_not_mix_with_a_commands_output():
    """The first command on a machine also makes what Swift needs and says so: beside the output, not in it."""
    for folder in (cache_folder() / "swift-root/opt/llama", cache_folder() / "swift-llama"):
        (folder / "version").unlink(missing_ok=True)
    done = call("echo", "only this")
    assert done.stdout == "only this\n" and "llama.cpp's headers" in done.stderr
