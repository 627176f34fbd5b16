"""The README is held to the repository: its commands run, its tree and figures are the real ones."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from importlib import import_module

import peft
import pytest
import transformers
from support import ROOT, SCRIPTS, TINY, free_port, run

README = (ROOT / "README.md").read_text()
HOW_TO = [ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands(page: str) -> list[list[str]]:
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def desk(checkpoint, bundles, corpus, tmp_path_factory):
    """A folder with a corpus, a checkpoint, an adapter and bundles by the names that the pages use."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(checkpoint, folder / "my-phi", ignore=shutil.ignore_patterns("training"))
    shutil.copytree(bundles, folder / "bundles")
    shutil.copytree(corpus, folder / "my-corpus")
    shutil.copy(checkpoint / "training" / "shards" / "heldout.txt", folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    peft.get_peft_model(model, lora).save_pretrained(folder / "my-lora")
    return folder


def tool(name):
    """A module of tools/, which is no package."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return import_module(name)
    finally:
        sys.path.pop(0)


def serves(command, desk):
    """It says where it is to be found, answers there, and ends when it is told to."""
    command[command.index("--port") + 1] = "0"  # whichever is free
    with subprocess.Popen([SCRIPTS / command[0], *command[1:]], cwd=desk, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().split()[-1]
        with urllib.request.urlopen(f"{address}/health") as answer:
            assert b'"ok"' in answer.read()
        process.terminate()
        assert process.wait(20) in (0, 143, -15)


def collects(command, desk):
    """It shows where a phone is to send its result, and waits for one."""
    with subprocess.Popen(
        [SCRIPTS / command[0], *command[1:], "--port", str(free_port())], cwd=desk, stdout=subprocess.PIPE, text=True
    ) as process:
        assert any("POST the result to http://" in line for line in process.stdout)
        process.terminate()


def runs(page, desk, corpus, done=()):
    """A page's commands and programs run as they are written; of phi-train, at a size that tests can wait for."""
    for block in blocks(page, "toml"):
        if block.startswith("# "):  # its name
            (desk / block.splitlines()[0].removeprefix("# ")).write_text(block)
    for command in commands(page):
        if not command[0].startswith("phi-") or command in done:
            continue
        given = list(command)
        if given[0] == "phi-train" and given[1].endswith("-demo") and "--dry-run" not in given:
            small = (*TINY, f"data.corpus={corpus}") if given[1] == "phi3-demo" else ("data.sequence_length=160",)
            given += [part for s in (*small, "schedule.steps=2") for part in ("--set", s)]
        if given[:2] == ["phi-bench", "run"]:
            given += ["--rounds", "1"]
        if given[1] == "make-sft-data":
            given += ["--corpus", str(corpus)]
        if given[:2] == ["phi-run", "plan"] and "--context" in given:
            given[given.index("--context") + 1] = "64"  # the test's model reads no more than 100 tokens
        if given[:2] == ["phi-run", "serve"]:
            serves(given, desk)
            continue
        if given[:2] == ["phi-bench", "collect"]:
            collects(given, desk)
            continue
        if given[:2] == ["phi-export", "--int4"] and "my-phi" in given and "--force" not in given:
            given.append("--force")
        ended = subprocess.run(
            [SCRIPTS / given[0], *given[1:]],
            cwd=desk,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, (command, ended.stderr)
    for program in blocks(page, "python"):
        ended = subprocess.run([sys.executable, "-c", program], cwd=desk, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout


def test_its_commands_run_as_written(desk, corpus):
    assert {c[0] for c in commands(README) if c[0].startswith("phi-")} == {"phi-export", "phi-run", "phi-train"}
    for program in blocks(README, "python"):
        assert len([line for line in program.splitlines() if line.strip()]) <= 5
    runs(README, desk, corpus)


@pytest.mark.parametrize("page", HOW_TO, ids=lambda p: p.stem)
def test_the_commands_of_the_documentation_run_as_written(page, desk, corpus):
    runs(page.read_text(), desk, corpus, done=commands(README))


RECIPES = [b for p in HOW_TO for b in blocks(p.read_text(), "toml") if b.startswith("recipe")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_files_of_the_documentation(recipe, tmp_path):
    (tmp_path / "my-recipe.toml").write_text(recipe)
    done = run("phi-train", tmp_path / "my-recipe.toml", "--out", tmp_path / "run", "--dry-run")
    assert done.returncode == 0, done.stderr


@pytest.mark.integration
def test_the_site_is_built_without_a_warning(tmp_path):
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [SCRIPTS / "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    reference = (tmp_path / "site" / "reference" / "phi-train.html").read_text()
    assert "phi-train make-preferences" in reference and "--conversations FILE" in reference
    for page in (tmp_path / "site").rglob("*.html"):  # it works offline
        assert not re.search(r"(?:src|href)=.https?://(?!github)[^ >]*\.(?:js|css|woff2?)", page.read_text()), page


def test_its_other_commands_are_make_targets_and_extras():
    others = [c for c in commands(README) if not c[0].startswith("phi-")]
    for command in others:
        if command[0] == "make":
            done = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        else:
            assert command[:2] == ["pip", "install"]
            extras = re.search(r"\[(.*)\]", command[2])[1].split(",")
            project = (ROOT / "pyproject.toml").read_text()
            assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)


def test_its_tree_is_the_real_one():
    (tree,) = re.findall(r"## Where things are\n\n```\n(.*?)```", README, re.DOTALL)
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line} - {".ci"}
    assert {name.split("/")[0] for name in named} == folders
    assert all((ROOT / name).is_dir() for name in named)


def test_its_figures_are_the_kept_reports():
    readme = tool("readme")
    body = README.split(readme.BEGIN)[1].split(readme.END)[0]
    assert body.strip() == readme.table(readme.load(readme.KEPT)).strip()
    assert (ROOT / "docs" / "demo.svg").is_file()


def test_the_tables_of_quality_are_the_kept_figures():
    quality = tool("quality_tables")
    page = (ROOT / "docs" / "explanation" / "quality.md").read_text()
    assert page.split(quality.BEGIN)[1].split(quality.END)[0].strip() == quality.figures().strip()


def test_the_tables_of_the_benchmark_are_the_kept_results():
    tables = tool("benchmark_tables")
    page = tables.PAGE.read_text()
    for path in tables.KEPT.glob("*.json"):
        begin, end = tables.markers(path.stem)
        assert page.split(begin)[1].split(end)[0].strip() == tables.table(path.stem).strip(), path


def test_the_samples_figures_are_those_of_the_documentation():
    (table,) = re.findall(r"\| \| bytes \| perplexity .*?\n\n", README, re.DOTALL)
    assert table in (ROOT / "docs" / "explanation" / "quality.md").read_text()


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
