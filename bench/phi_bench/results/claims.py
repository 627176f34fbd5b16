"""`phi-bench claim`: each sentence that is said of size and speed, and the figure behind it, or that there is none."""

from dataclasses import dataclass

from phi_bench import figures
from phi_bench.records import Benchmark, Row
from phi_bench.results.tables import machine_line

MINI = 3_821_079_552  # weights of phi-3-mini (config.json of Phi-3-mini-4k-instruct)
_PHONE = ("iPhone15,2", "iPhone15,3", "iPhone 14 Pro")
NOT_YET = "not measured yet"


@dataclass(frozen=True)
class Claim:
    """A sentence, whose it is, and what was measured: a metric, its value, and by what."""

    sentence: str
    source: str
    metrics: tuple[tuple[str, str, str], ...]

    @property
    def measured(self) -> bool:
        """Whether every metric has a figure."""
        return all(value != NOT_YET for _, value, _ in self.metrics)


def claims(results: list[Benchmark]) -> list[Claim]:
    """The Phi-3 report's two sentences and ours, with what these results say of them."""
    mini = [(row, b) for b in results for row in b.rows if figures.good_runs(row) and _is_mini(row, b)]
    on_phone = [(row, b) for row, b in mini if (b.host.device or "") in _PHONE]
    laptop = [(row, b) for row, b in mini if b.host.device is None]
    smallest = min(mini, key=lambda found: figures.model_of(*found).file_bytes or 0, default=None)
    size = [
        _size("file", smallest and figures.model_of(*smallest).file_bytes, smallest),
        _size("physical: peak resident, laptop", _peak(laptop), _least(laptop)),
        _size("physical: peak resident, iPhone 14 Pro", _peak(on_phone), _least(on_phone)),
        _size("charged to the app, iPhone 14 Pro", _charged(on_phone), _least(on_phone)),
    ]
    fastest = max(on_phone, key=lambda found: _rate(found[0]), default=None)
    speed = ("decode, tokens/s", f"{_rate(fastest[0]):.1f}" if fastest else NOT_YET, _said(fastest))
    found = [
        Claim("phi-3-mini in 4 bits takes about 1.8 GB of memory", "arXiv 2404.14219, section 2", tuple(size)),
        Claim("more than 12 tokens/s on an iPhone 14 Pro, offline", "arXiv 2404.14219, section 2", (speed,)),
    ]
    formats = {f: [(r, b) for r, b in laptop if figures.model_of(r, b).format == f] for f in ("gguf", "onnx", "coreml")}
    ours: list[tuple[str, str, str]] = []
    for name, rows in formats.items():
        best = min(rows, key=lambda found: figures.model_of(*found).file_bytes or 0, default=None)
        ours.append(_size(f"{name}: file", best and figures.model_of(*best).file_bytes, best))
        ours.append((f"{name}: decode, tokens/s", f"{_rate(best[0]):.1f}" if best else NOT_YET, _said(best)))
    sentence = "one phi-3-mini checkpoint as GGUF, ONNX and Core ML at about 1.8 GB, run on a laptop"
    return [*found, Claim(sentence, "phi-edge", tuple(ours))]


def _is_mini(row: Row, b: Benchmark) -> bool:
    """Our bundles of it: others' files at other sizes are no evidence for these sentences."""
    model = figures.model_of(row, b)
    parameters = model.parameters if model.file_bytes is not None else None
    return row.configuration.adapter in ("phi-run", "phi-edge-swift") and parameters == MINI


def _rate(row: Row) -> float:
    found = figures.decode(row)
    return found.value if found else 0.0


def _least(rows: list[tuple[Row, Benchmark]]) -> tuple[Row, Benchmark] | None:
    return min(rows, key=lambda found: p.value if (p := figures.peak(found[0])) else float("inf"), default=None)


def _peak(rows: list[tuple[Row, Benchmark]]) -> float | None:
    found = _least(rows)
    peak = figures.peak(found[0]) if found else None
    return peak.value if peak else None


def _charged(rows: list[tuple[Row, Benchmark]]) -> float | None:
    found = [
        m.generated.charged
        for row, _ in rows
        for run in figures.good_runs(row)
        if (m := run.memory) and m.generated and m.generated.charged
    ]
    return min(found, default=None)


def _size(metric: str, size: float | None, by: tuple[Row, Benchmark] | None) -> tuple[str, str, str]:
    value = NOT_YET if size is None else f"{size / 1e9:.3f} GB ({size / 2**30:.3f} GiB)"
    return metric, value, _said(by) if size is not None else ""


def _said(by: tuple[Row, Benchmark] | None) -> str:
    return f"{by[0].name}; {machine_line(by[1])}" if by else ""
