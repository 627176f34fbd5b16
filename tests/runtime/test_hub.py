"""Published models by name, from a hub on loopback."""

import json
import os
import resource
import shutil
import signal

import pytest
from hub_server import COMMIT, TOKEN, Hub
from support import run, settings

from phi_runtime.package.hub import is_name, local_checkpoint


@pytest.fixture
def hub(checkpoint, tmp_path):
    mine = tmp_path / "repo"
    shutil.copytree(checkpoint, mine, ignore=shutil.ignore_patterns("training", "calibration"))
    (mine / "pytorch_model.bin").write_bytes(b"pickled")  # never fetched
    (mine / "README.md").write_text("a card")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    (other / "model.safetensors").write_bytes(b"weights")
    found = Hub({"acme/tiny-phi": mine, "acme/closed-phi": mine, "acme/bert": other}, gated=("acme/closed-phi",))
    yield found
    found.close()


@pytest.fixture
def environment(hub, tmp_path):
    given = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return given | {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}


def export(name, out, environment, *more):
    return run("phi-export", "--int4", "--fast", name, "--out", out, "--format", "gguf", *more, env=environment)


def test_what_is_a_name(tmp_path, monkeypatch):
    assert is_name("microsoft/Phi-3-mini-4k-instruct") and is_name("microsoft/phi-2@main")
    assert not any(map(is_name, ("phi", "./a/b", "/a/b", "a/b/c", "../a/b", "-a/b", "a/b@")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "phi").mkdir(parents=True)
    assert not is_name("acme/phi")  # a folder that is there
    assert local_checkpoint("acme/phi").samefile(tmp_path / "acme" / "phi")


def test_a_model_is_exported_by_its_name(hub, environment, tmp_path):
    done = export("acme/tiny-phi", tmp_path / "a", environment)
    assert done.returncode == 0, done.stderr
    assert f"acme/tiny-phi: fetching what is not in the cache yet, revision {COMMIT[:12]}" in done.stderr
    source = json.loads((tmp_path / "a" / "gguf" / "phi-bundle.json").read_text())["source"]
    assert source["revision"] == COMMIT
    fetched = {path.rsplit("/", 1)[-1] for method, path in hub.asked if method == "GET" and "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "README.md"}

    before = len(hub.asked)
    offline = export("acme/tiny-phi", tmp_path / "b", environment | {"HF_HUB_OFFLINE": "1"}, "--dry-run")
    assert offline.returncode == 0, offline.stderr
    assert len(hub.asked) == before
    # The cache's own folder, whose files are links, is a path like any other.
    snapshot = next((tmp_path / "cache").rglob(COMMIT))
    assert (snapshot / "model.safetensors").is_symlink()
    done = export(snapshot, tmp_path / "c", environment, "--dry-run")
    assert done.returncode == 0, done.stderr


def test_a_run_begins_with_a_model_by_its_name(environment, tmp_path):
    name = "acme/tiny-phi"
    common = (f"init_from={name}", f"data.tokenizer={name}", "schedule.steps=1", "samples=0", "data.corpus=/nowhere")
    short = ("--set", "data.sequence_length=64", "--dry-run")
    done = run("phi-train", "phi3-demo", "--set", f"model={name}", *short, "--out", tmp_path / "x", env=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["model"]["hidden_size"] == 192, done.stderr
    done = run("phi-train", "phi3-demo", "--out", tmp_path / "run", *settings(*common), env=environment)
    assert done.returncode == 2 and "/nowhere: no such folder" in done.stderr  # all before the corpus was found


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("acme/nothing", "no such folder, and no such model on the hub; check the name"),
        ("acme/closed-phi", "is gated; accept its terms on its page while signed in, then set HF_TOKEN"),
        ("acme/tiny-phi@v9", "acme/tiny-phi has no such revision"),
        ("acme/bert", "model_type"),
    ],
)
def test_what_cannot_be_fetched(name, says, hub, environment, tmp_path):
    done = export(name, tmp_path / "out", environment)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert done.stderr.strip().count("\n") == 0 and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not any("safetensors" in path for _, path in hub.asked)


def test_a_token_from_the_environment_opens_what_is_gated(environment, tmp_path):
    done = export("acme/closed-phi", tmp_path / "out", environment | {"HF_TOKEN": TOKEN}, "--dry-run")
    assert done.returncode == 0, done.stderr


def test_offline_without_a_cache(environment, tmp_path):
    done = export("acme/tiny-phi", tmp_path / "out", environment | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and "is not in the cache, and the hub cannot be reached" in done.stderr


def test_a_download_that_breaks_off_goes_on(hub, environment, tmp_path):
    hub.breaks = 1000
    done = export("acme/tiny-phi", tmp_path / "out", environment)
    assert done.returncode == 2, done.stderr
    assert "the download broke off" in done.stderr and "Traceback" not in done.stderr
    hub.breaks = 0
    done = export("acme/tiny-phi", tmp_path / "out", environment, "--dry-run")
    assert done.returncode == 0, done.stderr


def test_a_full_disk_is_named(environment, tmp_path):
    """As elsewhere in these tests, the system refuses bytes beyond a limit."""

    def restrict():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run(
        "phi-export", "--int4", "--fast", "acme/tiny-phi", "--out", tmp_path / "out", env=environment,
        preexec_fn=restrict,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "the disk is full" in last and "HF_HUB_CACHE" in last
    assert "Traceback" not in done.stderr
