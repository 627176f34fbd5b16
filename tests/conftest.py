import os
import shutil
import sysconfig
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
from support import run, settings

from phi_runtime.package.formats import FORMATS

# Fixtures that train or export something.
HEAVY = {"checkpoint", "bundles"}


# Modules that take minutes, which begin first, so that no process waits for another at the end.
LONG = ("test_families", "test_tuning", "test_ranks", "test_bad_input", "test_readme", "test_sample", "test_verify")


def pytest_collection_modifyitems(items):
    """Tests on what was trained or exported are integration tests, whether they say so or not."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if HEAVY & set(getattr(item, "fixturenames", ())):
            item.add_marker("integration")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of real text: some packages of the standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for package in ("asyncio", "email", "importlib", "json", "logging", "unittest"):
        shutil.copytree(stdlib / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, corpus) -> Path:
    """A checkpoint that phi-train made in some seconds; it predicts text far better than chance."""
    out = tmp_path_factory.mktemp("trained") / "tiny-phi"
    done = run("phi-train", "phi3-demo", "--out", out, *settings(f"data.corpus={corpus}"))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def bundles(tmp_path_factory, checkpoint) -> Path:
    """The checkpoint, exported in all formats."""
    out = tmp_path_factory.mktemp("exported") / "bundles"
    done = run("phi-export", "--int4", "--fast", checkpoint, "--out", out, "--format", ",".join(FORMATS))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def text(checkpoint) -> Path:
    """Text that the checkpoint was not trained on."""
    return checkpoint / "training" / "shards" / "heldout.txt"


@pytest.fixture(scope="session")
def tokens(checkpoint, text) -> list[int]:
    """Some hundreds of its tokens."""
    from phi_runtime.text.tokenizer import Tokenizer

    found = Tokenizer(checkpoint).encode(text.read_text())
    assert len(found) > 1000
    return found


@pytest.fixture
def stranger(bundles, tmp_path) -> Path:
    """The GGUF file alone, as another publisher would give it."""
    return Path(shutil.copy(bundles / "gguf" / "model.gguf", tmp_path / "other.gguf"))
