"""Kill a training run at random points, again and again; it must end in the bytes of one that was never stopped.

    phi-bench suite training-kills --kills 50 --out DIR [--processes 2] [--set key=value ...]

After every fifth kill a byte of the newest state is flipped: a state that is not whole may not be continued from.
After each kill the log so far is compared with the unbroken run's, loss by loss. The processes that train are forked
from one that has imported all that they need, so that most of the time is training.
"""

import argparse
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np

from phi_bench.suites.runs import log

RECIPE = "phi3-demo"


def main(argv: list[str]) -> None:
    """Print how many of the kills left no trace."""
    p = argparse.ArgumentParser("phi-bench suite training-kills", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--processes", type=int, default=1, help="that train together")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--set", action="append", default=[], dest="settings")
    args = p.parse_args(argv)
    draw = np.random.default_rng(args.seed)
    shutil.rmtree(args.out, ignore_errors=True)
    whole, broken = args.out / "whole", args.out / "broken"
    if not ended(start(args.settings, whole, args.processes)):
        sys.exit(f"the unbroken run failed; see {whole}.log")
    expected = losses(whole)
    kills = flips = exact = 0
    while not (broken / "config.json").exists():
        pids = start(args.settings, broken, args.processes)
        if kills == args.kills:
            if not ended(pids):
                sys.exit(f"it failed, unkilled, after {kills} kills; see {broken}.log")
            break
        # From the first moments to some steps into the run.
        began, before, late = time.monotonic(), len(losses(broken)), draw.random() < 0.8
        while late and not (broken / "config.json").exists() and time.monotonic() - began < 60:
            if len(losses(broken)) > before + 2:
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.5))
        for pid in draw.permutation(pids):
            os.kill(int(pid), signal.SIGKILL)
            time.sleep(draw.uniform(0, 0.1))
        ended(pids)
        kills += 1
        found = losses(broken)
        exact += found == expected[: len(found)]
        states = sorted((broken / "training" / "state").glob("step-*"))
        if kills % 5 == 0 and len(states) > 1:
            files = sorted(states[-1].iterdir())
            file = files[draw.integers(len(files))]
            raw = bytearray(file.read_bytes())
            raw[draw.integers(len(raw))] ^= 1 << int(draw.integers(8))
            file.write_bytes(raw)
            flips += 1
        print(f"kill {kills} at step {len(found)}, {exact} exact, {flips} states spoilt", flush=True)
    same = all((whole / n).read_bytes() == (broken / n).read_bytes() for n in ("model.safetensors", "config.json"))
    print(f"{kills} kills, {exact} with the unbroken run's losses, {flips} spoilt states; same bytes: {same}")
    print(f"all {len(expected)} losses the same: {losses(broken) == expected}")


def start(settings: list[str], out: Path, processes: int) -> list[int]:
    """Fork the processes of a run; what they say goes to a file beside its folder."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from phi_train.recipes.catalogue import get_recipe
    from phi_train.trainer.loop import train

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out.parent.mkdir(parents=True, exist_ok=True)
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        said = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = 1
        try:
            train(get_recipe(RECIPE, settings), out)
            code = 0
        finally:
            os._exit(code)  # nothing of the process that it was forked from is run
    return pids


def ended(pids: list[int]) -> bool:
    """Wait for processes; whether all ended well."""
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    return not any(codes)


def losses(run: Path) -> list[float]:
    """Of the steps taken so far."""
    return [line["loss"] for line in log(run)]
