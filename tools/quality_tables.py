"""Write the tables of docs/explanation/quality.md from the figures kept in docs/quality/.

    python tools/quality_tables.py

`NAME.json` is what `phi-bench suite quality` wrote for the checkpoint NAME, `ablation-NAME.json` what
`phi-bench suite quality-ablation` did.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
KEPT, PAGE = ROOT / "docs" / "quality", ROOT / "docs" / "explanation" / "quality.md"
BEGIN, END = "<!-- figures: tools/quality_tables.py -->", "<!-- end of figures -->"
GROUPS = {
    "kv": "the cache alone, in llama.cpp, weights in float32",
    "gguf": "GGUF, run by llama.cpp",
    "onnx": "ONNX",
    "coreml": "Core ML, weights in float32 arithmetic",
}


def figures() -> str:
    """All tables."""
    parts = []
    for path in sorted(p for p in KEPT.glob("*.json") if not p.name.startswith("ablation-")):
        rows = json.loads(path.read_text())
        for group, title in GROUPS.items():
            found = [r for r in rows if r["group"] == group]
            if found:
                parts.append(f"### {path.stem}: {title}\n\n{_models(found)}")
    for path in sorted(KEPT.glob("ablation-*.json")):
        parts.append(
            f"### {path.stem.removeprefix('ablation-')}: step by step\n\n{_steps(json.loads(path.read_text()))}"
        )
    return "\n\n".join(parts)


def _models(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | bytes | bits/weight | mean KL divergence | same top token | perplexity | made in |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        change = 100 * (r["perplexity"] / r["checkpoint_perplexity"] - 1)
        lines.append(
            f"| {r['name']} | {r['bytes']:,} | {r['bits']:.3f} | {r['kld_mean']:.5f} ± {r['kld_error']:.5f} "
            f"| {100 * r['top1_agreement']:.2f} % | {change:+.2f} % | {r['seconds']:.0f} s |"
        )
    return "\n".join(lines)


def _steps(report: dict[str, Any]) -> str:
    lines = ["| step | mean KL divergence | same top token | seconds |", "| --- | ---: | ---: | ---: |"]
    for r in report["arms"]:
        lines.append(
            f"| {r['name']} | {r['kld_mean']:.5f} ± {r['kld_error']:.5f} | {100 * r['top1_agreement']:.2f} % "
            f"| {r['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Put the tables between the marks."""
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{figures()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
