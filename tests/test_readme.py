"""The README is held to the repository: its commands run, its tree and figures are the real ones."""

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
from support import ROOT, SCRIPTS, TINY

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def desk(checkpoint, tmp_path_factory):
    """A folder with a checkpoint and an adapter by the names that the README uses."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(checkpoint, folder / "my-phi", ignore=shutil.ignore_patterns("training"))
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


def test_its_commands_run_as_written(desk, corpus):
    ours = [c for c in commands() if c[0].startswith("phi-")]
    assert {c[0] for c in ours} == {"phi-export", "phi-run", "phi-bench", "phi-train"}
    for command in ours:
        if command[:2] == ["phi-train", "phi3-demo"]:  # the same command, at a size that tests can wait for
            command += [part for s in (*TINY, f"corpus={corpus}", "steps=2") for part in ("--set", s)]
        if command[:2] == ["phi-run", "serve"]:
            serves(command, desk)
            continue
        done = subprocess.run(
            [SCRIPTS / command[0], *command[1:]],
            cwd=desk,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)
    for program in blocks("python"):
        assert len([line for line in program.splitlines() if line.strip()]) <= 5
        done = subprocess.run([sys.executable, "-c", program], cwd=desk, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_its_other_commands_are_make_targets_and_extras():
    others = [c for c in commands() if not c[0].startswith("phi-")]
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
    assert body.strip() == readme.figures(readme.load(readme.KEPT)).strip()
    assert (ROOT / "docs" / "demo.svg").is_file()


def test_the_tables_of_quality_are_the_kept_figures():
    quality = tool("quality")
    page = (ROOT / "docs" / "quality.md").read_text()
    assert page.split(quality.BEGIN)[1].split(quality.END)[0].strip() == quality.figures().strip()


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
