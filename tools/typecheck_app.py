"""Check the types of what only Apple compiles, on Linux: `python tools/typecheck_app.py`.

mobile/Stubs declares what we use of Apple's frameworks, each with the page it was taken from; against these modules the
app and Core ML's half of PhiRuntime are type-checked as Swift 6. What Apple's frameworks do, availability and
anything that a stub has wrong is not seen.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUBS = ("CoreML", "Darwin", "UIKit", "os", "UniformTypeIdentifiers", "AppIntents", "SwiftUI", "Charts")
OURS = ("PhiBundle", "PhiRuntime", "PhiBench", "PhiAppCore")  # each after what it imports
OUT = "out/stubs"
FLAGS = (
    "-swift-version 6 -warnings-as-errors -parse-as-library -enable-upcoming-feature ExistentialAny "
    f"-Xcc -I$PKG_CONFIG_PATH/include -I mobile/Sources/CLlama -I {OUT}"
)


def main() -> None:
    """Compile the stubs and our modules, then check the app; the compiler's exit code."""
    lines = [f"rm -rf {OUT} && mkdir -p {OUT}"]
    lines += [_module(name, f"mobile/Stubs/{name}.swift", "") for name in STUBS]
    strict = "-enable-upcoming-feature InternalImportsByDefault"
    lines += [_module(name, f"mobile/Sources/{name}/*.swift", strict) for name in OURS]
    lines.append(f"swiftc -typecheck {FLAGS} mobile/App/PhiApp/*.swift")
    lines.append("echo checked")
    done = subprocess.run([sys.executable, ROOT / "tools/swift.py", "sh", "-ec", "\n".join(lines)], check=False)
    sys.exit(done.returncode)


def _module(name: str, sources: str, more: str) -> str:
    named = f"-module-name {name} -package-name PhiEdge"
    return f"swiftc -emit-module {named} {FLAGS} {more} {sources} -o {OUT}/{name}.swiftmodule"


if __name__ == "__main__":
    main()
