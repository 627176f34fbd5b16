"""Verify a bundle against its checkpoint. It fails closed: every check must pass.

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi_export.calibrate.equalise import equalised, read_scales
from phi_export.formats import get_format
from phi_export.verify.check import Check, Progress
from phi_export.verify.gate import REFUSED, HeldOutText, judge
from phi_export.verify.logits import compare_logits
from phi_export.verify.manifest import wrong_claim
from phi_export.verify.text import sample_tokens
from phi_export.verify.weights import check_weights
from phi_runtime.architecture.checkpoint import ADAPTER, Checkpoint
from phi_runtime.errors import BundleError, PhiError, UnsupportedError, UsageError, VerificationError
from phi_runtime.package.manifest import HeldOut, Manifest, Parity, SelfTest, check_files, find_bundle, read_manifest

MAX_KLD = 1.0
MAX_KV_KLD = 0.02  # of a cache of 8 bits from the cache without
# What may be done about a loss; any other failure is no matter of taste.
_ADVICE = {
    "int8 cache": "do not calibrate it, or keep it for use without `--kv int8`: --accept-loss",
    "held-out text": "give it more bytes or calibrate, or keep it: --accept-loss",
}


@dataclass(frozen=True)
class Verification:
    """The outcome: all checks, the agreement where the artifact could be run at all, what it costs on held-out text,
    where that was looked at, and the self-test for its manifest.
    """

    checks: tuple[Check, ...]
    parity: Parity | None
    quality: HeldOut | None = None
    self_test: SelfTest | None = None

    @property
    def passed(self) -> bool:
        """Whether everything was looked at and every check passed."""
        return self.parity is not None and all(c.passed for c in self.checks)

    def require(self, folder: Path) -> Parity:
        """The agreement of a bundle that passed. Raises VerificationError otherwise."""
        if self.parity is None or not self.passed:
            c = next(c for c in self.checks if not c.passed)
            figure = "" if np.isinf(c.value) else f" ({c.value:.3g}, at most {c.limit:.3g} is allowed)"
            advice = f"; {_ADVICE[c.name]}" if c.name in _ADVICE else ""
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
    if (wrong := wrong_claim(bundle, manifest, checkpoint, written_now)) is not None:
        return _failed("files", wrong)
    if len(tokens) < 2:
        raise UsageError("verification needs at least two tokens of text")
    checks: list[Check] = []
    try:
        progress("files")
        if not written_now:
            check_files(bundle, manifest)
        checkpoint = equalised(checkpoint, read_scales(bundle, checkpoint.config.decoder()))  # the same function
        get_format(manifest.format).validate(bundle, manifest, checkpoint)
        read = get_format(manifest.format).read(bundle, manifest)
        checks += check_weights(read, manifest, checkpoint, progress)
        if not all(c.passed for c in checks):
            return Verification(tuple(checks), None)
        found = compare_logits(bundle, manifest, checkpoint, read, tokens, progress)
    except (BundleError, UnsupportedError) as e:
        return _failed("files", str(e), checks)
    except (PhiError, AssertionError, AttributeError, NameError, TypeError):  # the last four are bugs of ours
        raise
    except Exception as e:  # whatever reading or running a broken artifact meets: it does not pass
        return _failed("files", f"the artifact cannot be read ({type(e).__name__}: {e})", checks)
    graph, quality, cache = found.graph, found.quality, found.cache
    where = f"over {quality.tokens} tokens"
    allowed = get_format(manifest.format).ROUNDING_MARGIN * found.arithmetic.logit_error
    checks.append(Check("graph", graph.logit_error, allowed, f"relative error of the logits {where}"))
    limit = math.inf if manifest.source.random else MAX_KLD  # what a random model says means nothing
    checks.append(Check("quality", quality.kld_mean, limit, f"mean KL divergence {where}, nats"))
    if cache.tokens:
        allowed = MAX_KLD if held_out is not None and held_out.accept_loss else MAX_KV_KLD
        limit = math.inf if manifest.source.random else allowed
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
        layer_errors=found.layer_errors,
    )
    judged = None
    if held_out is not None and not manifest.source.random and all(c.passed for c in checks):
        judged = judge(bundle, manifest, held_out, progress)
        allowed = math.inf if held_out.accept_loss else REFUSED
        where = f"rise of the perplexity on {judged.tokens} held-out tokens"
        checks.append(Check("held-out text", judged.rise, allowed, where))
    return Verification(tuple(checks), parity, judged, found.self_test)


def _failed(name: str, why: str, checks: list[Check] | None = None) -> Verification:
    return Verification((*(checks or []), Check(name, np.inf, 0, why)), None)
