import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
from support import ROOT, run, settings


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of real text: this repository's own sources."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in [*ROOT.glob("*/phi_*/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, corpus) -> Path:
    """A checkpoint that phi-train made in some seconds; it predicts text far better than chance."""
    out = tmp_path_factory.mktemp("trained") / "tiny-phi"
    done = run("phi-train", "phi3-demo", "--out", out, *settings(f"corpus={corpus}"))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def bundles(tmp_path_factory, checkpoint) -> Path:
    """The checkpoint, exported in all formats."""
    out = tmp_path_factory.mktemp("exported") / "bundles"
    done = run("phi-export", "--int4", checkpoint, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def text(checkpoint) -> Path:
    """Text that the checkpoint was not trained on."""
    return checkpoint / "training" / "shards" / "heldout.txt"


@pytest.fixture(scope="session")
def tokens(checkpoint, text) -> list[int]:
    """Some hundreds of its tokens."""
    from phi_runtime.tokenizer import Tokenizer

    found = Tokenizer(checkpoint).encode(text.read_text())
    assert len(found) > 1000
    return found
