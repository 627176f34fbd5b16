"""Holding a bundle to its checkpoint. It fails closed: every check must pass.

1. `files`: every file is the one the manifest describes; what the manifest says of the checkpoint is
   so, and the files that came along with it (tokenizer, configurations) are its own.
2. `weights`: what the artifact stores, read back, is the checkpoint's tensor up to the rounding
   its type allows, block by block.
3. `graph`: the artifact run by its own runtime, prompts and single tokens both, gives the logits of
   the reference computation on those same weights. How far its arithmetic alone may move them is not
   guessed: the reference imitates it on the same tokens. Here a wrong RoPE, mask or wiring shows; a
   wrong window too, because the tokens reach beyond it unless fewer are asked for.
4. `tokenizer`: where the artifact has a tokenizer of its own (GGUF), it makes the same tokens.
5. `quality`: the loss against the checkpoint itself is one of rounding, not of breakage; on held-out text, the
   perplexity rises by no more than the gate (`gate`) allows.
"""

import math
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi_export.calibrate.equalise import equalised, read_scales
from phi_export.formats import Item, Options, get_format, items, stored
from phi_export.verify.gate import LARGE, REFUSED, HeldOutText, judge
from phi_export.verify.metrics import Agreement, windows
from phi_export.verify.subprocess_run import Artifact
from phi_runtime.architecture.checkpoint import ADAPTER, Checkpoint, stop_tokens
from phi_runtime.architecture.config import num_parameters, read_json
from phi_runtime.architecture.decoder import F32, Decoder
from phi_runtime.backends import cores
from phi_runtime.backends.reference import Lane, ReadTensor, Reference
from phi_runtime.errors import BundleError, CheckpointError, PhiError, UnsupportedError, UsageError, VerificationError
from phi_runtime.files import sha256
from phi_runtime.package.manifest import HeldOut, Manifest, Parity, Source, check_files, find_bundle, read_manifest
from phi_runtime.text.chat_templates import chat_name
from phi_runtime.text.tokenizer import Tokenizer
from phi_train.checkpoints.init import RANDOM

DEFAULT_TOKENS = 256  # or as many as reach beyond the model's window, unless the model is large
WINDOW = 512  # tokens read from an empty context at a time, or as many
_BEYOND = 64
_SINGLY = 8  # tokens at the end of each piece that are fed one by one, as generation does; of a large model 2
_WATCHED = 32  # positions at the end of each piece whose activations are compared layer by layer
_PIECE = 1 << 21  # weights compared at a time

# How far rounding may be off, in units of what the type does to normally distributed weights. Worse
# distributions cost a few times that; two tensors mixed up give an error of about 2, a lost scale 1.
_TENSOR_MARGIN, _BLOCK_MARGIN = 4.5, 22
_MAX_ERROR = 0.95
# Error feedback moves weights further than rounding does, where outputs do not see it, and a block takes the errors of
# others too. But that is noise: little of it lies along the weights (a quarter of a block's energy, at most, in four
# bits; coarse types shrink weights by their own error), where what is lost or foreign is off by all of it. Beside a
# block of nothing stands a tenth of its row's mean.
_MAX_ALONG, _MAX_ALONG_ALL, _OTHERS = 0.6, 0.2, 0.1
MAX_VECTOR_ERROR = 1e-6
_MAX_HALF_ERROR = 1e-3  # of vectors that are stored in float16
MAX_KLD = 1.0
MAX_KV_KLD = 0.02  # of a cache of 8 bits from the cache without

# What clients of every format find beside the artifact, as it is beside the checkpoint.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

_SAMPLE = Path(__file__).with_name("sample.txt")
_UNUSUAL = "\n\t  a   b\u00e9\u65e5\U0001f600 x I'LL we've 1234567 \r\n\r\n e\u0301 \u00a0nbsp x=3.14;"
_AROUND = (" ", "  ", "\n", "\n\n ", "a", " b", "word ", " 42", "\u00e9\u65e5", "\t", "'s")
_PROBED = 200  # added tokens looked at, and random strings of them

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: the figure, the limit it is held to, and which part was worst."""

    name: str
    value: float
    limit: float
    where: str

    @property
    def passed(self) -> bool:
        """NaN fails."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Verification:
    """The outcome: all checks, the agreement where the artifact could be run at all, and what it costs on held-out
    text, where that was looked at.
    """

    checks: tuple[Check, ...]
    parity: Parity | None
    quality: HeldOut | None = None

    @property
    def passed(self) -> bool:
        """Whether everything was looked at and every check passed."""
        return self.parity is not None and all(c.passed for c in self.checks)

    def require(self, folder: Path) -> Parity:
        """The agreement of a bundle that passed. Raises VerificationError otherwise."""
        if self.parity is None or not self.passed:
            c = next(c for c in self.checks if not c.passed)
            figure = "" if np.isinf(c.value) else f" ({c.value:.3g}, at most {c.limit:.3g} is allowed)"
            advice = "" if c.name != "held-out text" else "; give it more bytes or calibrate, or keep it: --accept-loss"
            raise VerificationError(
                f"{folder}: does not agree with its checkpoint: {c.name}: {c.where}{figure}{advice}"
            )
        return self.parity


def verify(
    bundle: Path,
    checkpoint: Checkpoint,
    tokens: list[int] | None = None,
    progress: Progress = lambda _: None,
    held_out: HeldOutText | None = None,
) -> Verification:
    """Hold a bundle with a manifest to a checkpoint, over `tokens` (by default a built-in sample), and its quality to
    what the gate allows on a held-out text.

    Raises NotFoundError where there is no bundle, UsageError if it is of another architecture; a
    bundle that is there but broken is a Verification that did not pass.
    """
    bundle = find_bundle(bundle)
    try:
        manifest = read_manifest(bundle)
    except PhiError as e:
        return _failed("files", str(e))
    return verify_manifest(bundle, manifest, checkpoint, tokens, progress, held_out=held_out)


def verify_manifest(
    bundle: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    tokens: list[int] | None,
    progress: Progress,
    written_now: bool = False,
    held_out: HeldOutText | None = None,
) -> Verification:
    """As `verify`, for a bundle whose manifest is not written yet; files `written_now` are not digested again."""
    if ADAPTER in manifest.source.sha256 and not any(f.name == ADAPTER for f in checkpoint.files):
        raise UsageError(f"{bundle}: was made with a LoRA adapter; give its folder with --adapter")
    if manifest.config() != checkpoint.config:
        raise UsageError(f"{bundle}: is not of the architecture of {checkpoint.folder}; give its own checkpoint")
    tokens = sample_tokens(checkpoint) if tokens is None else tokens
    if not written_now:
        progress("the checkpoint's digests")
    if (wrong := _wrong_claim(bundle, manifest, checkpoint, written_now)) is not None:
        return _failed("files", wrong)
    if len(tokens) < 2:
        raise UsageError("verification needs at least two tokens of text")
    checks: list[Check] = []
    try:
        progress("files")
        if not written_now:
            check_files(bundle, manifest)
        checkpoint = equalised(checkpoint, read_scales(bundle, checkpoint.config.decoder()))  # the same function
        get_format(manifest.format).examine(bundle, manifest, checkpoint)
        read = get_format(manifest.format).read(bundle, manifest)
        checks += _check_weights(read, manifest, checkpoint, progress)
        if not all(c.passed for c in checks):
            return Verification(tuple(checks), None)
        graph, arithmetic, quality, cache, layers = _run(bundle, manifest, checkpoint, read, tokens, progress)
    except (BundleError, UnsupportedError) as e:
        return _failed("files", str(e), checks)
    except PhiError:
        raise
    except Exception as e:  # whatever reading or running a broken artifact meets: it does not pass
        return _failed("files", f"the artifact cannot be read ({type(e).__name__}: {e})", checks)
    where = f"over {quality.tokens} tokens"
    allowed = get_format(manifest.format).ROUNDING_MARGIN * arithmetic.logit_error
    checks.append(Check("graph", graph.logit_error, allowed, f"relative error of the logits {where}"))
    limit = math.inf if manifest.source.random else MAX_KLD  # what a random model says means nothing
    checks.append(Check("quality", quality.kld_mean, limit, f"mean KL divergence {where}, nats"))
    if cache.tokens:
        limit = math.inf if manifest.source.random else MAX_KV_KLD
        checks.append(
            Check(
                "int8 cache",
                cache.kld_mean,
                limit,
                f"mean KL divergence from the whole cache over {cache.tokens} tokens, nats",
            )
        )
    parity = Parity(
        tokens=quality.tokens,
        logit_error=graph.logit_error,
        kld_mean=quality.kld_mean,
        top1_agreement=quality.top1_agreement,
        perplexity=quality.perplexity_q,
        checkpoint_perplexity=quality.perplexity_p,
        layer_errors=layers,
    )
    judged = None
    if held_out is not None and not manifest.source.random and all(c.passed for c in checks):
        judged = judge(bundle, manifest, held_out, progress)
        allowed = math.inf if held_out.accept_loss else REFUSED
        where = f"rise of the perplexity on {judged.tokens} held-out tokens"
        checks.append(Check("held-out text", judged.rise, allowed, where))
    return Verification(tuple(checks), parity, judged)


def _wrong_claim(bundle: Path, manifest: Manifest, checkpoint: Checkpoint, written_now: bool) -> str | None:
    """What the bundle says of itself that does not follow from the checkpoint, if anything."""
    module = get_format(manifest.format)
    try:
        options = Options(**manifest.options)
        context = module.context(checkpoint.config, options)
        plan = {i.name: stored(module, i, _said_type(manifest, i), options) for i in items(checkpoint.config, options)}
    except (TypeError, KeyError, UnsupportedError, UsageError):
        return "the manifest's options and types of tensors are not what phi-export writes"
    expected: dict[str, tuple[object, object]] = {
        "stop tokens": (manifest.stop_tokens, stop_tokens(checkpoint)),
        "context": (manifest.context, context),
        "window": (manifest.window, checkpoint.config.sliding_window),
        "types of tensors": (manifest.quantization, plan),
        "chat format": (manifest.chat, chat_name(checkpoint.folder)),
    }
    if not written_now:
        source = describe_source(checkpoint)
        expected["digests of the checkpoint"] = (manifest.source.sha256, source.sha256)
        expected["word on whether the weights are random"] = (manifest.source.random, source.random)
    for name, (said, is_so) in expected.items():
        if said != is_so:
            return f"the manifest's {name} are not what follows from the checkpoint"
    for name in COMPANIONS:
        original, copy = checkpoint.folder / name, bundle / name
        if original.is_file() and not (copy.is_file() and copy.read_bytes() == original.read_bytes()):
            return f"{copy}: is not the checkpoint's own {name}"
    return None


def describe_source(checkpoint: Checkpoint) -> Source:
    """What a bundle's manifest says of its checkpoint; reads all of it, for the digests."""
    folder = checkpoint.folder.resolve()
    # A Hugging Face cache keeps each revision in a folder of the commit's name.
    revision = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None
    name = str(read_json(folder / "config.json").get("_name_or_path") or folder.name)
    drawn = RANDOM in read_json(folder / "config.json")
    return Source(name, revision, {f.name: sha256(f) for f in checkpoint.files}, drawn)


def _said_type(manifest: Manifest, item: Item) -> str:
    said = manifest.quantization.get(item.name)
    return "" if said is None else said.type


def _failed(name: str, why: str, checks: list[Check] | None = None) -> Verification:
    return Verification((*(checks or []), Check(name, np.inf, 0, why)), None)


def sample_tokens(checkpoint: Checkpoint, text: Path | None = None, count: int | None = None) -> list[int]:
    """The first `count` tokens of a text; by default, of the built-in sample, enough to see all there is.

    Raises UsageError for a text that cannot be read or is too short.
    """
    path = text or _SAMPLE
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({e}); give another --text") from None
    tokens = Tokenizer(checkpoint.folder).encode(content)
    if text is None:  # the sample is short: read it again and again
        window = checkpoint.config.decoder().window() or 0
        beyond = window + _BEYOND if num_parameters(checkpoint.config) < LARGE else 0
        wanted = count or max(DEFAULT_TOKENS, beyond)
        tokens *= -(-wanted // max(1, len(tokens)))
        count = wanted
    tokens = tokens[:count]
    if tokens and max(tokens) >= checkpoint.config.vocab_size:
        raise CheckpointError(f"{checkpoint.folder}: its tokenizer gives tokens beyond the embedding")
    if len(tokens) < 2:
        raise UsageError(f"{path}: gives {len(tokens)} tokens; at least two are needed")
    return tokens


def _check_weights(read: ReadTensor, manifest: Manifest, checkpoint: Checkpoint, progress: Progress) -> list[Check]:
    """Every stored tensor against the checkpoint's, a piece at a time; one check for blocks, tensors and vectors each.

    Errors are in units of their limits, which depend on the type.
    """
    options = Options(**manifest.options)
    kinds = get_format(manifest.format).types(options)
    worst = {"block": (0.0, ""), "tensor": (0.0, ""), "vector": (0.0, "")}
    with ThreadPoolExecutor(cores()) as pool:
        for item in items(checkpoint.config, options):
            progress(item.name)
            step = max(1, _PIECE // item.columns)
            quant = manifest.quantization[item.name]
            if item.role == "vector":
                error = _vector_error(read(item.tensor), checkpoint.read(item.tensor))
                limit = MAX_VECTOR_ERROR if quant.type == "float32" else _MAX_HALF_ERROR
                worst["vector"] = max(worst["vector"], (_nan_is_worst(error / limit), item.name))
                continue
            fed_back = manifest.calibration is not None
            expected = kinds[quant.type].error
            # Where whole rows share a table, a part of them that is small beside the rest may be lost.
            block, floor = (quant.block, 1e-6) if quant.block > 1 else (item.columns, 1.0)

            def compare(start: int, item: Item = item, step: int = step, block: int = block) -> tuple[np.ndarray, F32]:
                stop = min(item.stop, start + step)
                stored_rows, original = read(item.tensor, start, stop), checkpoint.read(item.tensor, start, stop)
                if stored_rows.shape != original.shape:
                    raise BundleError(f"{item.tensor} has rows of another shape than the checkpoint's")
                moved, shape = stored_rows - original, (len(original), -1, block)
                error, energy = (np.square(x).reshape(shape).sum(axis=2) for x in (moved, original))
                along = np.abs((moved * original).reshape(shape).sum(axis=2))
                beside = energy + _OTHERS * energy.mean(axis=1, keepdims=True)
                sums = np.array([error.sum(dtype=np.float64), (moved * original).sum(dtype=np.float64)])
                return sums, np.stack([error, energy, along / (beside + 1e-30)]).reshape(3, -1)

            parts = list(pool.map(compare, range(item.start, item.stop, step)))
            error, energy, along = np.concatenate([p[1] for p in parts], axis=1).astype(np.float64)
            if fed_back:
                errors, block_limit = along, _MAX_ALONG
            else:  # blocks of next to nothing count for nothing
                errors = error / (energy + floor * energy.mean() + 1e-30)
                block_limit = min(_MAX_ERROR, max(_BLOCK_MARGIN * expected, 2e-3))
            figure = _nan_is_worst(float(errors.max()) / block_limit)
            worst["block"] = max(worst["block"], (figure, f"{item.name}, block {errors.argmax()}"))
            whole, along_all = np.sum([p[0] for p in parts], axis=0) / max(float(energy.sum()), 1e-30)
            figure = whole / min(_MAX_ERROR, max(_TENSOR_MARGIN * expected, 2e-4))
            if fed_back:
                figure = max(whole / (1 + 10 * expected), abs(along_all) / (_MAX_ALONG_ALL + 1.5 * expected))
            worst["tensor"] = max(worst["tensor"], (_nan_is_worst(figure), item.name))
    return [
        Check("weights", value, 1.0, f"error of the worst {kind} as a share of what its type allows, {where}")
        for kind, (value, where) in worst.items()
    ]


def _vector_error(stored_vector: F32, original: F32) -> float:
    if stored_vector.shape != original.shape:
        return math.inf
    return float(np.abs(stored_vector - original).max() / max(float(np.abs(original).max()), 1e-30))


def _nan_is_worst(value: float) -> float:
    return float("inf") if np.isnan(value) else float(value)


def _check_tokenizer(artifact: Artifact, checkpoint: Checkpoint) -> None:
    ours = Tokenizer(checkpoint.folder)
    for text in (_SAMPLE.read_text(encoding="utf-8") + _UNUSUAL, *_probes(ours.added_tokens)):
        theirs = artifact.tokenize(text)
        if theirs is None:
            return
        if theirs != (expected := ours.encode(text)):
            at = next((i for i, (a, b) in enumerate(zip(theirs, expected, strict=False)) if a != b), len(expected))
            raise BundleError(
                f"the artifact's own tokenizer splits {text[:60]!r} otherwise than tokenizer.json: "
                f"{theirs[at : at + 4]} for {expected[at : at + 4]} from token {at} on; "
                "llama.cpp may not have its kind: use --format onnx,coreml"
            )


def _probes(added: list[str]) -> Iterator[str]:
    """Added tokens with and without spaces, line breaks and letters around them, and random strings of them."""
    draw = random.Random(0)  # noqa: S311
    for token in added if len(added) <= _PROBED else draw.sample(added, _PROBED):
        yield from (f"{before}{token}{after}" for before in ("", "a", "b ", "c\n") for after in ("", "d", " e", "\n f"))
    pieces = [*added, *(_AROUND * max(1, len(added) // 4))]
    for _ in range(_PROBED):
        yield "".join(draw.choices(pieces, k=6))


def _fed_singly(decoder: Decoder, length: int, singly: int) -> int:
    """How many tokens at a piece's end are fed one by one: none if LongRoPE would change its factors among them."""
    crosses = decoder.rope is not None and decoder.rope.long and length - singly <= decoder.rope.original < length
    return 0 if crosses or length <= 2 * singly else singly


def _run(
    bundle: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    read: ReadTensor,
    tokens: list[int],
    progress: Progress,
) -> tuple[Agreement, Agreement, Agreement, Agreement, tuple[float, ...]]:
    """Against the reference on the bundle's own weights: its logits, and the imitation of its arithmetic; against the
    checkpoint: its logits; against these: those with a cache of 8 bits, if it has one; and per layer what the weights'
    rounding did.
    """
    graph, arithmetic, quality, cache = Agreement(), Agreement(), Agreement(), Agreement()
    decoder, rounding = checkpoint.config.decoder(), get_format(manifest.format).rounding
    layers = np.zeros((len(decoder.layers), 2))
    singly = _SINGLY if num_parameters(checkpoint.config) < LARGE else 2
    length = min(max(WINDOW, (decoder.window() or 0) + _BEYOND), manifest.context)
    ends = []
    with Artifact(bundle) as artifact:
        _check_tokenizer(artifact, checkpoint)
        for i, piece in enumerate(windows(tokens, length)):
            where = f"tokens {i * length} to {i * length + len(piece)}"
            targets = piece[1:]
            progress(f"the artifact, {where}")
            logits = artifact.logits(piece, _fed_singly(decoder, len(piece), singly))
            ends.append(logits[-_WATCHED:].copy())
            rounded: list[F32] = []

            def keep(n: int, lanes: list[Lane], rounded: list[F32] = rounded) -> None:
                rounded.append(lanes[0].x_TE[-_WATCHED:])

            def hold(n: int, lanes: list[Lane], rounded: list[F32] = rounded) -> None:
                exact = lanes[0].x_TE[-_WATCHED:]
                layers[n] += np.square(rounded[n] - exact).sum(), np.square(exact).sum()

            progress(f"its weights in the reference, {where}")
            both = Reference(decoder, read, 0, (lambda x: x, rounding), keep).forward(piece, True)
            graph.add(both[0], logits, targets)
            arithmetic.add(both[0], both[1], targets)
            progress(f"the checkpoint, {where}")
            exact = Reference(decoder, checkpoint.read, 0, watch=hold).forward(piece, True)[0]
            quality.add(exact, logits, targets)
    if manifest.options.get("int8_kv"):  # in a process of its own, after the other's memory is free
        progress("the cache of 8 bits")
        with Artifact(bundle, "int8") as artifact:
            for piece, end in zip(windows(tokens, length), ends, strict=True):
                logits = artifact.logits(piece, _fed_singly(decoder, len(piece), singly))[-_WATCHED:]
                cache.add(end, logits, piece[1 - len(end) :])
    errors = np.sqrt(layers[:, 0] / np.maximum(layers[:, 1], 1e-30))
    return graph, arithmetic, quality, cache, tuple(float(f"{e:.4g}") for e in errors)
