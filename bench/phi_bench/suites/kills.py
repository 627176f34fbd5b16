"""Kill a training run at random points, again and again; it must end in the bytes of one that was never stopped.

    phi-bench suite training-kills --kills 50 --out DIR [--processes 2] [--set key=value ...]

After every fifth kill a byte of the newest state is flipped: a state that is not whole may not be continued from.
After each kill the log so far is compared with the unbroken run's, loss by loss.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from phi_bench.suites.runs import log


def main(argv: list[str]) -> None:
    """Print how many of the kills left no trace."""
    p = argparse.ArgumentParser("phi-bench suite training-kills", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--processes", type=int, default=1, help="that train together, under torchrun")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--set", action="append", default=[], dest="settings")
    args = p.parse_args(argv)
    draw = np.random.default_rng(args.seed)
    shutil.rmtree(args.out, ignore_errors=True)
    programs = Path(sys.executable).parent
    launcher = [str(programs / "torchrun"), "--standalone", "--nproc-per-node", str(args.processes)]
    command = [*(launcher if args.processes > 1 else []), str(programs / "phi-train"), "phi3-demo"]
    command += [part for setting in args.settings for part in ("--set", setting)]
    whole, broken = args.out / "whole", args.out / "broken"
    subprocess.run([*command, "--out", str(whole)], check=True, stderr=subprocess.DEVNULL)
    expected = losses(whole)
    kills = flips = exact = 0
    while not (broken / "config.json").exists():
        process = subprocess.Popen(
            [*command, "--out", str(broken)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if kills < args.kills:
            # From the start of the interpreter to some steps into the run.
            began, patience = time.monotonic(), draw.uniform(0, 3)
            before = len(losses(broken))
            late = draw.random() < 0.8
            while process.poll() is None and time.monotonic() - began < 60:
                if not late or len(losses(broken)) > before + 2:
                    break
                time.sleep(0.01)
            time.sleep(patience)
        else:
            process.wait()
        if process.poll() is not None:
            if process.returncode != 0:
                sys.exit(f"it ended with {process.returncode}, unkilled, after {kills} kills")
            break
        kill(process)
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


def kill(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to a process and all that it started: torchrun's workers have sessions of their own."""
    root = psutil.Process(process.pid)
    root.suspend()  # it starts none meanwhile
    family = [*root.children(recursive=True), root]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family)
    process.wait()


def losses(run: Path) -> list[float]:
    """Of the steps taken so far."""
    return [line["loss"] for line in log(run)]
