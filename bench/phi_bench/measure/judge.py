"""Quality of each file and engine once, over logits of the checkpoint that are computed once."""

from pathlib import Path

import msgspec

from phi_bench import figures
from phi_bench.adapters import adapter
from phi_bench.measure.checkpoint import reference_logits
from phi_bench.measure.job import Job, job
from phi_bench.measure.journal import Journal
from phi_bench.measure.process import Outcome, measure
from phi_bench.measure.request import Progress, most_context
from phi_bench.measure.subjects import Subject
from phi_bench.records import Failure
from phi_export.verify.logits import WINDOW
from phi_runtime.architecture.checkpoint import open_checkpoint


def judge(row: Subject) -> tuple[str, str] | None:
    """The adapter and engine that give the logits of a row's file."""
    return adapter(row.configuration.adapter).judge(row.configuration.engine)


def judge_all(
    rows: list[Subject],
    checkpoint_folder: Path,
    text: Path,
    journal: Journal,
    progress: Progress,
    done: int,
    steps: int,
) -> None:
    """Fill in the quality of all rows that can be judged, were measured and have none yet."""
    settings = journal.b.settings
    todo = [r for r in rows if judge(r) is not None]
    todo = [r for r in todo if journal.row(r.name).quality is None and journal.row(r.name).quality_failure is None]
    todo = [r for r in todo if figures.good_runs(journal.row(r.name))]
    if not todo:
        return
    checkpoint = open_checkpoint(checkpoint_folder)
    length = min(WINDOW, checkpoint.config.max_position_embeddings, *(c for r in todo if (c := most_context(r.path))))
    known: dict[tuple[str, str, str, str | None], Outcome] = {}
    with reference_logits(checkpoint, text, settings.quality_tokens or 0, length, progress.note) as folder:
        for i, row in enumerate(todo):
            progress.step(done + i, steps, f"quality: {row.name}")
            asked = _job(row, journal, folder)
            kv = asked.kv or adapter(asked.adapter).kv(row.path, asked.engine, None)
            key = (asked.path, asked.adapter, asked.engine, kv)
            if key not in known:
                known[key] = measure(asked, 10 * settings.timeout_s, settings.memory_limit)
            outcome = known[key]
            if outcome.result is not None:
                journal.change(row.name, quality=outcome.result.quality)
            else:
                journal.change(row.name, quality_failure=outcome.failure or Failure("crashed", "it said nothing"))
    quality = next((r.quality for r in journal.b.rows if r.quality), None)
    if quality is not None and journal.b.checkpoint is not None:
        described = msgspec.structs.replace(journal.b.checkpoint, perplexity=quality.checkpoint_perplexity)
        journal.b = msgspec.structs.replace(journal.b, checkpoint=described)


def _job(row: Subject, journal: Journal, folder: Path) -> Job:
    """By the adapter and engine that judge; another engine than the row's has its own type of cache."""
    judging = judge(row)
    assert judging is not None
    name, engine = judging
    c = row.configuration
    kv = c.kv if name == c.adapter else None
    asked = job("quality", row.path, c, journal.b.settings)
    return msgspec.structs.replace(asked, adapter=name, engine=engine, kv=kv, context=512, logits=str(folder))
