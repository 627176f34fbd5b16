"""Write a synthetic corpus: ask for documents, read the replies, try what they claim, keep what holds."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import IO, Any

from phi_runtime.contract import Contract, encode
from phi_runtime.errors import OutputExistsError
from phi_runtime.files import staged_folder, write_file
from phi_train.curate.config import Settings
from phi_train.curate.decontaminate import Decontaminator
from phi_train.curate.documents import Document, json_line
from phi_train.curate.evaluation_set import EvaluationSet
from phi_train.curate.funnel import SAMPLES, Sample
from phi_train.sandbox.run import Job, Limits, run_all
from phi_train.synthesize.diversity import Diversity, DiversityCounter
from phi_train.synthesize.kinds import Draft, Kind, RejectedError
from phi_train.synthesize.stories import instruction
from phi_train.teacher.endpoint import Endpoint, Reply

_AT_A_TIME = 256  # documents that are tried together
_SHOWN = 400  # characters of a sample
_SEEDS = 1_000_003  # of documents, between two seeds of runs
_LIMITS = Limits(seconds=5.0, memory=512 << 20)

# Told documents asked for so far, all of them, and those kept.
Progress = Callable[[int, int, int], None]


class SynthesisReport(Contract, frozen=True):
    """Of `asked` replies, `kept` are documents; `rejected` counts the others by reason, `samples` shows some.

    executed: documents whose code was run; passed: those whose code did what it claims. similar: passing documents
    that were taken out because they are like a problem of `against`. tokens and dollars: what the teacher was asked for
    altogether, replies that were kept from before included.
    """

    kind: str
    teacher: str
    seed: int
    asked: int
    kept: int
    rejected: dict[str, int]
    samples: tuple[Sample, ...]
    executed: int
    passed: int
    against: tuple[str, ...]
    similar: int
    diversity: Diversity
    tokens: int = 0
    dollars: float = 0.0
    cached: int = 0


def synthesize(
    kind: Kind,
    teacher: Endpoint | None,
    count: int,
    out: Path,
    seed: int = 0,
    against: Iterable[EvaluationSet] = (),
    topics: int = 0,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> SynthesisReport:
    """Write the folder `out`: documents.jsonl, report.json, for stories also the texts of TinyStories-Instruct.

    teacher: None for the simulator. topics: that documents are drawn from. max_tokens: of a reply, by default the
    kind's. Raises OutputExistsError, SandboxError where
    code is to be run and cannot be confined, and what `Endpoint.replies` raises.
    """
    if out.exists() and not force:
        raise OutputExistsError(f"{out}: exists already; choose another --out, or --force")
    filters = [Decontaminator(a, Settings()) for a in against]
    found = _Run(kind, filters)
    with staged_folder(out) as folder, _Writer(folder, kind.instructs, seed) as writer:
        numbered = enumerate(_replies(kind, teacher, count, seed, max_tokens, temperature))
        while part := list(islice(numbered, _AT_A_TIME)):
            for document in found.tried(part):
                writer.write(*document)
            progress(part[-1][0] + 1, count, found.diversity.documents)
        report = SynthesisReport(
            kind=kind.name,
            teacher="simulator" if teacher is None else teacher.name,
            seed=seed,
            asked=count,
            kept=found.diversity.documents,
            rejected=dict(found.rejected.most_common()),
            samples=tuple(found.samples),
            executed=found.executed,
            passed=found.passed,
            against=tuple(f.against.name for f in filters),
            similar=found.similar,
            diversity=found.diversity.result(topics),
            tokens=0 if teacher is None else teacher.budget.tokens,
            dollars=0.0 if teacher is None else round(teacher.budget.dollars, 6),
            cached=0 if teacher is None else teacher.cached,
        )
        write_file(folder / "report.json", encode(report))
    return report


def _replies(
    kind: Kind, teacher: Endpoint | None, count: int, seed: int, max_tokens: int | None, temperature: float
) -> Iterator[Reply]:
    if teacher is None:
        return (Reply(kind.simulated(n)) for n in range(count))
    requests = (
        replace(
            r := kind.request(n), max_tokens=max_tokens or r.max_tokens, temperature=temperature, seed=seed * _SEEDS + n
        )
        for n in range(count)
    )
    return teacher.replies(requests)


class _Run:
    """Replies to documents, with what became of the others."""

    def __init__(self, kind: Kind, filters: list[Decontaminator]) -> None:
        self._kind, self._filters = kind, filters
        self._seen: set[bytes] = set()
        self.rejected: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.executed = self.passed = self.similar = 0
        self.diversity = DiversityCounter()

    def tried(self, replies: list[tuple[int, Reply]]) -> list[tuple[str, Draft]]:
        """The documents of some replies that are to be kept."""
        drafts: list[tuple[str, Draft]] = []
        for number, reply in replies:
            name = f"{self._kind.name}/{number:08d}"
            try:
                if reply.finish != "stop":
                    raise RejectedError("was cut off" if reply.finish == "length" else "no reply")
                draft = self._kind.draft(number, reply.text)
                digest = hashlib.blake2b(draft.text.encode(), digest_size=16).digest()
                if digest in self._seen:
                    raise RejectedError("stands there already")
                self._seen.add(digest)
                drafts.append((name, draft))
            except RejectedError as e:
                self._reject(name, reply.text, str(e))
        drafts = list(self._running(drafts))
        for by in self._filters:
            drafts = self._apart(drafts, by)
        for _, draft in drafts:
            self.diversity.add(draft.text, draft.topic)
        return drafts

    def _running(self, drafts: list[tuple[str, Draft]]) -> Iterator[tuple[str, Draft]]:
        jobs: list[Job] = [job for _, d in drafts for job in (d.job, d.must_fail) if job is not None]
        outcomes = run_all(jobs, _LIMITS) if jobs else iter(())
        for name, draft in drafts:
            why = ""
            if draft.job is not None:
                self.executed += 1
                outcome = next(outcomes)
                why = "" if outcome.kind == "passed" else f"its code ends in {outcome.kind}"
            if draft.must_fail is not None and next(outcomes).kind == "passed" and not why:
                why = "its tests cannot fail"
            if why:
                self._reject(name, draft.text, why)
                continue
            self.passed += draft.job is not None
            yield name, draft

    def _apart(self, drafts: list[tuple[str, Draft]], by: Decontaminator) -> list[tuple[str, Draft]]:
        """Those that are like no problem."""
        kept = []
        found = by.matches([Document(name, draft.text, b"") for name, draft in drafts])
        for (name, draft), matches in zip(drafts, found, strict=True):
            if any(map(by.similar, matches)):
                self.similar += 1
                self._reject(name, draft.text, f"like a problem of {by.against.name}")
            else:
                kept.append((name, draft))
        return kept

    def _reject(self, name: str, text: str, why: str) -> None:
        self.rejected[why] += 1
        if self.rejected[why] <= SAMPLES:
            self.samples.append(Sample(name, text[:_SHOWN], why))


class _Writer:
    """The folder's files."""

    def __init__(self, folder: Path, instructs: bool, seed: int) -> None:
        names = ["documents.jsonl"]
        if instructs:
            names += ["instruct.jsonl", "instruct-heldout.jsonl"]
        self._files: dict[str, IO[bytes]] = {n: open(folder / n, "wb") for n in names}  # noqa: SIM115
        self._instructs, self._seed = instructs, seed

    def write(self, name: str, draft: Draft) -> None:
        """A document."""
        record: dict[str, Any] = {"id": name, "text": draft.text, **draft.fields}
        self._files["documents.jsonl"].write(json_line(record))
        if self._instructs:
            text, heldout = instruction(record, Random(f"instruction {self._seed} {name}"))  # noqa: S311
            file = "instruct-heldout.jsonl" if heldout else "instruct.jsonl"
            self._files[file].write(json_line({"id": name, "text": text}))

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
