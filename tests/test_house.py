"""The house: layout, extras, sizes, and what must not stand in it."""

import re
import subprocess
import tokenize
import tomllib

from support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_base_install_is_light():
    assert {re.match(r"[a-z-]+", d)[0] for d in PROJECT["dependencies"]} == {"msgspec", "numpy", "tokenizers"}
    wanted = {
        "gguf",
        "gguf-fast",
        "onnx",
        "coreml",
        "mlx",
        "server",
        "train",
        "sample",
        "hub",
        "export",
        "bench",
        "data",
        "eval",
        "web",
        "all",
        "dev",
    }
    assert set(PROJECT["optional-dependencies"]) == wanted


def test_what_is_asked_for_is_pinned():
    pins = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for requirements in PROJECT["optional-dependencies"].values():
        for requirement in requirements:
            name = re.match(r"[a-z0-9-]+", requirement)[0]
            assert name in pins | {"phi-edge"}, f"{name} is not in constraints.txt"


def test_files_stay_small():
    for name in tracked():
        if name.endswith(".py"):
            assert len((ROOT / name).read_text().splitlines()) <= 500, name


def test_no_pickle_no_eval_no_template_engine():
    words = "pickle", r"torch \. load", r"torch \. save", "jinja2", "trust_remote_code = True"
    forbidden = re.compile(rf"(?<!\. )\b(?:eval|exec) \(|\b(?:{'|'.join(words)})\b")
    assert forbidden.search("x = eval ( y )")
    assert forbidden.search("torch . load ( f )")
    confined = "train/phi_train/sandbox/worker.py"  # runs a model's programs, after it has given up all else
    for name in tracked():
        if name.endswith(".py") and not name.startswith("tests/") and name != confined:
            with open(ROOT / name, "rb") as f:
                tokens = [t for t in tokenize.tokenize(f.readline) if t.type in (tokenize.NAME, tokenize.OP)]
            code = " ".join(t.string for t in tokens)
            assert not forbidden.search(code), (name, forbidden.search(code)[0])


def test_tests_mirror_the_packages():
    for package in ("train", "export", "runtime", "bench"):
        assert list((ROOT / "tests" / package).glob("test_*.py"))
        assert (ROOT / package / f"phi_{package}" / "py.typed").is_file()
