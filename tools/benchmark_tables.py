"""Put measured tables into the documentation: `python tools/benchmark_tables.py`.

docs/benchmark/NAME.json is a result of `phi-bench run`; its table stands between the markers of NAME in
docs/explanation/benchmark.md. A test holds the page to the files.
"""

from pathlib import Path

from phi_bench.records import read_benchmark
from phi_bench.results.tables import cells, markdown

ROOT = Path(__file__).resolve().parent.parent
KEPT, PAGE = ROOT / "docs" / "benchmark", ROOT / "docs" / "explanation" / "benchmark.md"
_SHOWN = ("row", "size", "bits", "decode", "ratio", "prefill", "ttft", "p99", "peak", "roof", "kld", "top1")


def markers(name: str) -> tuple[str, str]:
    """What a table stands between."""
    return f"<!-- table: {name} -->", f"<!-- end of {name} -->"


def table(name: str) -> str:
    """A result's table, its machine and method, and its notes."""
    b = read_benchmark(KEPT / f"{name}.json")
    notes = [f"- {row.name}: {said}" for row in b.rows if (said := cells(row, b)["notes"].text)]
    text = markdown(b, _SHOWN)
    return text + ("\nNot to be trusted, or not measured:\n\n" + "\n".join(notes) + "\n" if notes else "")


def main() -> None:
    """Rewrite all tables."""
    page = PAGE.read_text()
    for path in sorted(KEPT.glob("*.json")):
        begin, end = markers(path.stem)
        before, rest = page.split(begin)
        page = before + begin + "\n\n" + table(path.stem) + "\n" + end + rest.split(end)[1]
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
