"""A benchmark as it grows: each change is written, so that a kill loses one process at most."""

from pathlib import Path

import msgspec

from phi_bench import figures
from phi_bench.records import Benchmark, Row, read_benchmark
from phi_bench.results.write import write_benchmark
from phi_runtime.errors import OutputExistsError, PhiError


class Journal:
    """The benchmark `b` in the file `out`."""

    def __init__(self, b: Benchmark, out: Path) -> None:
        self.b, self.out = b, out
        write_benchmark(out, b)

    def row(self, name: str) -> Row:
        """As it is now."""
        return next(r for r in self.b.rows if r.name == name)

    def change(self, name: str, **fields: object) -> None:
        """Fields of a row."""
        rows = tuple(msgspec.structs.replace(r, **fields) if r.name == name else r for r in self.b.rows)
        self.b = msgspec.structs.replace(self.b, rows=rows)
        write_benchmark(self.out, self.b)

    def finish(self, **fields: object) -> Benchmark:
        """Say what is to be doubted; `fields` are the benchmark's."""
        depths = self.b.settings.depths
        rows = tuple(msgspec.structs.replace(r, doubts=figures.doubts(r, depths)) for r in self.b.rows)
        self.b = msgspec.structs.replace(self.b, rows=rows, **fields)
        write_benchmark(self.out, self.b)
        return self.b


def begun(out: Path, fresh: Benchmark, force: bool) -> Benchmark:
    """`fresh`, or what stands in `out` where the same command left it incomplete. Raises OutputExistsError."""
    if not out.exists():
        return fresh
    try:
        old = read_benchmark(out)
    except PhiError as e:
        if force:
            return fresh
        raise OutputExistsError(f"{e}; --force replaces it") from None
    same = (old.settings, old.models, old.host.cpu) == (fresh.settings, fresh.models, fresh.host.cpu)
    same = same and [(r.name, r.configuration) for r in old.rows] == [(r.name, r.configuration) for r in fresh.rows]
    same = same and old.checkpoint_sha256 == fresh.checkpoint_sha256
    if force and (old.complete or not same):
        return fresh
    if old.complete or not same:
        what = "is a complete result" if old.complete else "was begun with other models, settings or versions"
        raise OutputExistsError(f"{out}: {what}; name another file, or replace it with --force")
    return old
