"""A checkpoint of any published architecture with random weights, without a download.

Right for bytes, memory and speed; what it says means nothing. Written a piece at a time.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from string import ascii_lowercase, digits, punctuation

import numpy as np

from phi_runtime.architecture.config import Config, parse_config, read_json
from phi_runtime.architecture.decoder import F32
from phi_runtime.backends import cores
from phi_runtime.errors import OutputExistsError, UsageError
from phi_runtime.files import staged_folder, write_file
from phi_train.checkpoints.header import safetensors_header
from phi_train.data.tokenizer import CHAT_TOKENS, STOPS, build_tokenizer, tokenizer_config
from phi_train.recipes.published import INIT_STD, PUBLISHED

RANDOM = "phi_edge_random_seed"  # key of config.json that says so
_SHARD = 2_000_000_000  # bytes of a file, at most, as published ones have it
_PIECE = 1 << 22  # weights drawn at a time
_RESERVED = 64  # ids at the end: phi-3-mini's chat tokens begin at vocab_size - 64

Progress = Callable[[str, int, int], None]


def init(architecture: str | Config, out: Path, seed: int | None = 0, progress: Progress = lambda *_: None) -> Config:
    """Write a checkpoint: matrices from N(0, 0.02) in bfloat16, norms one, biases zero, and a tokenizer of its size.

    architecture: a name of `PUBLISHED`, the path of a `config.json`, or a configuration. The same seed gives the
    same bytes; without one, all is zero and the files are holes: enough to measure speeds.
    Raises UsageError for an unknown name, OutputExistsError, and the errors of `parse_config`.
    """
    config, raw = _configuration(architecture)
    if out.exists():
        raise OutputExistsError(f"{out}: exists already; choose another --out")
    if config.vocab_size < 3 + 256 + _RESERVED + len(punctuation):
        raise UsageError(f"vocab_size {config.vocab_size} is too small for a tokenizer with all bytes")
    shards = _shards(config)
    shapes = config.tensor_shapes()
    with staged_folder(out) as stage, ThreadPoolExecutor(cores()) as pool:
        weight_map: dict[str, str] = {}
        done = 0
        for n, names in enumerate(shards, 1):
            name = f"model-{n:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            weight_map |= dict.fromkeys(names, name)
            for tensor in _write_shard(stage / name, {t: shapes[t] for t in names}, seed, pool):
                done += 1
                progress(tensor, done, len(shapes))
        if len(shards) > 1:
            total = 2 * sum(math.prod(shape) for shape in shapes.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_file(stage / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
        tokenizer = build_tokenizer(_pieces(config.vocab_size - _RESERVED - 3 - 256))
        (stage / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        write_file(stage / "tokenizer_config.json", json.dumps(tokenizer_config(tokenizer), indent=1) + "\n")
        stops = [config.vocab_size - _RESERVED + i for i, t in enumerate(CHAT_TOKENS) if t in STOPS]
        eos = stops if config.model_type == "phi3" else [t for t in (config.eos_token_id,) if t is not None]
        generation = {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": config.pad_token_id}
        write_file(stage / "generation_config.json", json.dumps(generation, indent=1) + "\n")
        write_file(stage / "config.json", json.dumps(raw | {RANDOM: seed}, indent=1) + "\n")
    return config


def _configuration(architecture: str | Config) -> tuple[Config, dict[str, object]]:
    if not isinstance(architecture, str):
        return architecture, architecture.to_json()
    if architecture in PUBLISHED:
        config = PUBLISHED[architecture]()
        return config, config.to_json()
    path = Path(architecture)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise UsageError(
            f"{architecture!r} is neither an architecture ({', '.join(PUBLISHED)}) nor the path of a config.json"
        )
    raw = read_json(path)
    config = parse_config(raw, path)
    if config.model_type != raw["model_type"]:  # a Phi under another name: written under its own
        return config, config.to_json()
    return config, {k: v for k, v in raw.items() if k != "auto_map"}  # its code is not with us


def _shards(config: Config) -> list[list[str]]:
    """Names of the tensors of each file, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in config.tensor_shapes().items():
        nbytes = 2 * math.prod(shape)
        if shards[-1] and size + nbytes > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _write_shard(
    path: Path, shapes: dict[str, tuple[int, ...]], seed: int | None, pool: ThreadPoolExecutor
) -> Iterator[str]:
    head, places = safetensors_header(shapes, {"format": "pt", "weights": f"random, seed {seed}"})
    base = len(head)
    with open(path, "wb") as f:
        f.write(head)
        f.truncate(base + 2 * sum(map(math.prod, shapes.values())))
        f.flush()

        if seed is None:
            return
        given = seed

        def write(name: str, start: int, stop: int) -> None:
            values = _values(name, shapes[name], start, stop, given)
            os.pwrite(f.fileno(), values.tobytes(), base + places[name] + 2 * start)

        for name, shape in shapes.items():
            count = math.prod(shape)
            starts = range(0, count, _PIECE)
            list(pool.map(lambda s, n=name, c=count: write(n, s, min(c, s + _PIECE)), starts))
            yield name


def _values(name: str, shape: tuple[int, ...], start: int, stop: int, seed: int) -> np.ndarray:
    """Elements start..stop of a tensor as the bits of bfloat16."""
    if len(shape) == 1:
        return np.full(stop - start, 0 if name.endswith(".bias") else 0x3F80, "<u2")
    key = [seed, start, *name.encode()]
    drawn = np.random.Generator(np.random.SFC64(key)).standard_normal(stop - start, dtype=np.float32)
    return bfloat16_bits(drawn * np.float32(INIT_STD))


def bfloat16_bits(x: F32) -> np.ndarray:
    """Finite float32 values rounded to the nearest bfloat16, as its bits."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")


def _pieces(count: int) -> list[str]:
    """The shortest strings of letters, with and without a space before them, after digits and signs."""
    space = "\u2581"
    found = [space, *digits, *ascii_lowercase, *ascii_lowercase.upper(), *punctuation]
    length = 1
    while len(found) < count:
        words = ["".join(w) for w in product(ascii_lowercase, repeat=length)]
        found += [space + w for w in words]
        length += 1
        if len(found) < count:
            found += ("".join(w) for w in product(ascii_lowercase, repeat=length))
    return found[:count]
