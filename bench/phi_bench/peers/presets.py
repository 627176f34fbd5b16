"""llama.cpp's presets of a checkpoint, made by its own llama-quantize: `phi-bench presets`."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from phi_bench.peers.llama_tools import find_tool
from phi_export.formats.gguf.unquantised import write_unquantised
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.backends import cores
from phi_runtime.errors import BenchmarkError, OutputExistsError
from phi_runtime.files import folder_beside


def make_presets(
    folder: Path, presets: tuple[str, ...], out: Path, progress: Callable[[str], None] = lambda _: None
) -> list[Path]:
    """Write `out`/PRESET.gguf for each, without an importance matrix. The checkpoint's weights in 16 bits stand beside
    them meanwhile.

    Raises OutputExistsError, BenchmarkError where llama-quantize is not there or refuses, errors of the checkpoint.
    """
    tool, checkpoint = find_tool("llama-quantize"), open_checkpoint(folder)
    if out.exists():
        raise OutputExistsError(f"{out}: is there already; name another folder")
    with folder_beside(out) as stage:
        base = stage / "unquantised.gguf"
        progress("writing the weights unquantised")
        write_unquantised(checkpoint, base)
        for preset in presets:
            progress(preset)
            command = [str(tool), str(base), str(stage / f"{preset}.gguf"), preset, str(cores())]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = (done.stderr + done.stdout).strip().splitlines()
                raise BenchmarkError(f"llama-quantize {preset}: {lines[-1] if lines else 'no reason given'}")
        base.unlink()
        os.rename(stage, out)
        stage.mkdir()  # what `folder_beside` takes away
    return [out / f"{preset}.gguf" for preset in presets]
