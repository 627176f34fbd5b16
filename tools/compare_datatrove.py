"""Time `phi-train data run` beside a plain datatrove pipeline of the same blocks, words and tokenizer, in turns.

    python tools/compare_datatrove.py CORPUS --tokenizer DIR --work DIR [--filter gopher-repetition] [--rounds 3]

CORPUS is a folder of Python files, written as JSON lines first, which both read. Printed are seconds of each round,
their ratio and the largest process of each. datatrove 0.10.1 wants xxhash < 4: put one in a folder of its own
(`pip install --target`) and name it in PYTHONPATH.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

WORKERS, FILES = 2, 8


def main() -> None:
    """Prepare, then run both arms in turns."""
    p = argparse.ArgumentParser()
    p.add_argument("corpus", type=Path)
    p.add_argument("--tokenizer", type=Path, required=True)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--filter", choices=["gopher-repetition", "gopher-quality", "length"], default="length")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--megabytes", type=float, default=112)
    p.add_argument("--arm", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.arm:
        (_ours if args.arm == "ours" else _datatrove)(args.work, args.tokenizer, args.filter)
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print(json.dumps({"peak_kB": peak}))
        return
    _prepare(args.corpus, args.work / "input", args.megabytes * 1e6)
    times: dict[str, list[float]] = {"ours": [], "datatrove": []}
    for round_ in range(args.rounds):
        for arm in times:
            shutil.rmtree(args.work / arm, ignore_errors=True)
            began = time.monotonic()
            given = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(given, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            times[arm].append(time.monotonic() - began)
            said = done.stdout.strip().splitlines()
            print(f"round {round_ + 1}, {arm}: {times[arm][-1]:.1f} s, {said[-2]}, {said[-1]}", flush=True)
    ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["datatrove"], strict=True)]
    print(f"datatrove / ours: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def _prepare(corpus: Path, folder: Path, most: float) -> None:
    if folder.exists():
        return
    folder.mkdir(parents=True)
    files = [open(folder / f"{n}.jsonl", "w", encoding="utf-8") for n in range(FILES)]  # noqa: SIM115
    size = count = 0
    for path in sorted(corpus.rglob("*.py")):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if size > most:
            break
        size += len(text)
        record = {"id": str(path.relative_to(corpus)), "text": text}
        files[count % FILES].write(json.dumps(record) + "\n")
        count += 1
    for f in files:
        f.close()
    print(f"{count:,} documents, {size / 1e6:.1f} M characters")


def _ours(work: Path, tokenizer: Path, kind: str) -> None:
    from phi_train.curate import config
    from phi_train.curate.run import run

    steps: dict[str, config.Step] = {
        "gopher-repetition": config.GopherRepetition(),
        "gopher-quality": config.GopherQuality(),
        "length": config.Length(min_chars=200),
    }
    asked = config.DataConfig(
        input=(str(work / "input"),), step=(steps[kind], config.MinHash()), tokenizer=str(tokenizer), documents=False
    )
    found = run(asked, work / "ours", WORKERS)
    print(f"{found.documents:,} documents, {found.tokens + found.heldout_tokens:,} tokens")


def _datatrove(work: Path, tokenizer: Path, kind: str) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup import MinhashDedupSignature as Signature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter, LambdaFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter

    from phi_train.curate.steps import words_tokenizer

    out, words, minhash = work / "datatrove", words_tokenizer(), MinhashConfig()
    block = {
        "gopher-repetition": lambda: GopherRepetitionFilter(language=words),
        "gopher-quality": lambda: GopherQualityFilter(language=words),
        "length": lambda: LambdaFilter(_long_enough),
    }[kind]()
    tokens = DocumentTokenizer(
        str(out / "tokens"),
        str(tokenizer / "tokenizer.json"),
        eos_token="<|endoftext|>",  # noqa: S106
        shuffle_documents=False,
    )
    kept = str(out / "kept")
    signatures, buckets, remove = str(out / "signatures"), str(out / "buckets"), str(out / "remove")

    def go(name: str, tasks: int, *steps: object) -> None:
        LocalPipelineExecutor(list(steps), tasks, WORKERS, str(out / "logs" / name)).run()

    go("filter", FILES, JsonlReader(str(work / "input")), block, JsonlWriter(kept, compression=None))
    go("signature", FILES, JsonlReader(kept), Signature(signatures, minhash, words))
    go("buckets", minhash.num_buckets, MinhashDedupBuckets(signatures, buckets, config=minhash))
    go("cluster", 1, MinhashDedupCluster(buckets, remove, minhash))
    go("tokens", FILES, JsonlReader(kept), MinhashDedupFilter(remove), tokens)
    stats = json.loads((out / "logs" / "tokens" / "stats.json").read_text())
    found = next(s["stats"] for s in stats if "tokens" in s["stats"])["tokens"]
    print(
        f"{stats[1]['stats']['forwarded']:,} documents, {found['total'] if isinstance(found, dict) else found:,} tokens"
    )


def _long_enough(document: object) -> bool:
    return len(document.text) >= 200  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
