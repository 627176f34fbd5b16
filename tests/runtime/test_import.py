import subprocess
import sys

BLOCKED = (
    "torch",
    "transformers",
    "onnx",
    "coremltools",
    "deepspeed",
    "safetensors",
    "onnxruntime",
    "llama_cpp",
    "rich",
)

PROGRAM = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name, name=name)
sys.meta_path.insert(0, Refuse())
{body}
"""


def python(body: str) -> subprocess.CompletedProcess:
    program = PROGRAM.format(blocked=BLOCKED, body=body)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_the_runtime_imports_with_the_heavy_packages_blocked():
    done = python("import phi_runtime, phi_runtime.cli; print(phi_runtime.load)")
    assert done.returncode == 0, done.stderr


def test_every_help_answers_without_them():
    for module in ("phi_runtime.cli", "phi_export.cli", "phi_train.cli", "phi_bench.cli"):
        done = python(f"import sys; sys.argv = ['x', '--help']; import {module} as m; m.main()")
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout
    for argv in (["verify", "--help"],):
        done = python(f"import sys; sys.argv = ['x', *{argv}]; import phi_export.cli as m; m.main()")
        assert done.returncode == 0, done.stderr


def test_a_missing_extra_is_named(bundles, checkpoint):
    for name, extra in (("gguf", "gguf"), ("onnx", "onnx")):
        done = python(
            f"import sys; sys.argv = ['x', 'generate', {str(bundles / name)!r}, '--prompt', 'x']\n"
            "import phi_runtime.cli as m; m.main()"
        )
        assert done.returncode == 2
        assert f"pip install 'phi-edge[{extra}]'" in done.stderr
    done = python("import sys; sys.argv = ['x', 'phi3-demo', '--out', '/tmp/x']\nimport phi_train.cli as m; m.main()")
    assert done.returncode == 2
    assert "phi-edge[train]" in done.stderr
    for module, extra, arguments in (
        ("phi_export", "export", ["--int4", "--fast", str(checkpoint), "--dry-run"]),
        ("phi_export", "export", ["verify", str(bundles / "onnx"), "--against", str(checkpoint)]),
        ("phi_bench", "bench", ["run", str(bundles / "onnx"), "--out", "/tmp/x.json"]),
    ):
        done = python(f"import sys; sys.argv = ['x', *{arguments!r}]\nimport {module}.cli as m; m.main()")
        assert done.returncode == 2, done.stderr
        assert f"phi-edge[{extra}]" in done.stderr
