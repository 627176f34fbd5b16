"""Swift's readers of what comes from outside against libFuzzer: `python tools/fuzz.py SECONDS [READER …]`.

Manifests, tokenizers, GGUF headers, zip archives, a server's headers and the link of a QR code; all of them where none
is named. Each starts from real files. A finding is left as a file in out/fuzz, and the exit code is 1.
"""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDEN, OUT = ROOT / "mobile/Tests/Golden", ROOT / "out/fuzz"
PROGRAM = "out/fuzz/fuzz"


def main() -> None:
    """Build, then fuzz one reader after the other."""
    seconds = int(sys.argv[1])
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    sources = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "mobile/Sources/PhiBundle").glob("*.swift"))]
    flags = ["-O", "-sanitize=fuzzer,address", "-parse-as-library", "-swift-version", "6", "-module-name", "Fuzz"]
    swift("swiftc", *flags, *sources, "mobile/Fuzz/Fuzz.swift", "-o", PROGRAM)
    for name, seeds in TARGETS.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        corpus = OUT / f"corpus-{name}"
        corpus.mkdir()
        for i, seed in enumerate(seeds()):
            (corpus / str(i)).write_bytes(seed)
        limits = [
            f"-max_total_time={seconds}",
            "-timeout=10",
            "-rss_limit_mb=4096",
            "-max_len=65536",
            "-print_final_stats=1",
        ]
        print(f"==> {name}", flush=True)
        swift(PROGRAM, *limits, f"-artifact_prefix=out/fuzz/{name}-", str(corpus.relative_to(ROOT)), PHI_FUZZ=name)
    print("==> no findings")


def swift(*command: str, **variables: str) -> None:
    """Run a command where Swift is; its failure ends this."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools/swift.py", *command], env={**os.environ, **variables}, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)


def _manifests() -> list[bytes]:
    cases = json.loads((GOLDEN / "manifests.json").read_text())
    return [base64.b64decode(c["manifest"]) for c in cases]


def _tokenizers() -> list[bytes]:
    return [p.read_bytes() for p in sorted((GOLDEN / "tokenizers").glob("*/tokenizer.json"))]


def _headers() -> list[bytes]:
    """A small GGUF file of our own."""
    import numpy as np
    from gguf import GGUFWriter

    path = OUT / "seed.gguf"
    writer = GGUFWriter(path, "phi3")
    writer.add_uint32("phi3.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0])
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [path.read_bytes()]


def _archives() -> list[bytes]:
    """Stored, deflated in small and in large, with sizes that follow."""
    text = (ROOT / "README.md").read_bytes()
    found = []
    for method, level in ((zipfile.ZIP_STORED, None), (zipfile.ZIP_DEFLATED, 1), (zipfile.ZIP_DEFLATED, 9)):
        for content in (b"x", text[:3000], bytes(70000)):
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w", method, compresslevel=level) as z:
                z.writestr("a/phi-bundle.json", content)
                with z.open("a/b", "w", force_zip64=True) as entry:
                    entry.write(content)
            found.append(out.getvalue())
    return found


def _headers_of_servers() -> list[bytes]:
    return [b"bytes 100-999/1000", b"bytes */1000", b'"abc-123"', b'W/"abc"']


def _links() -> list[bytes]:
    return [
        b"phi-edge://collect?to=192.168.1.5:8765&code=0123abcd",
        b"phi-edge://collect?code=0123abcdef&to=10.0.0.1:1",
    ]


TARGETS: dict[str, Callable[[], list[bytes]]] = {
    "manifest": _manifests,
    "tokenizer": _tokenizers,
    "gguf": _headers,
    "zip": _archives,
    "header": _headers_of_servers,
    "link": _links,
}

if __name__ == "__main__":
    main()
