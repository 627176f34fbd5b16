"""Measurements beyond `phi-bench run`, each a comparison with its own input: `phi-bench suite NAME`."""

from importlib import import_module

from phi_runtime.errors import UsageError

# By name: the module, and what it measures.
SUITES = {
    "runtime": ("runtime", "what prompt lookup and prefix caching save"),
    "memory": ("memory", "predicted memory against measured, by context and type of cache"),
    "quality": ("quality", "our bundles beside other exporters at equal bytes"),
    "quality-ablation": ("ablation", "our calibration beside other methods"),
    "load": ("load", "hours of clients at a server"),
    "training": ("trainer", "our trainer beside transformers' Trainer"),
    "training-stages": ("stages", "fine-tuning stages, each against its baseline"),
    "training-longrope": ("longrope", "context extension by LongRoPE"),
    "training-busy": ("busy", "training and decoding beside a busy process"),
    "int4": ("int4", "the study int4: four bits keep what a study's models have learnt, calibrated or not"),
    "gpu": ("gpu", "all that only a GPU can show of the trainer, in one go; --dry tries it without one"),
    "training-kills": ("kills", "a training run that is killed again and again"),
}


def run_suite(name: str, argv: list[str]) -> None:
    """Run one. Raises UsageError for a name that is none."""
    if name not in SUITES:
        raise UsageError(f"no suite {name!r}; choose from {', '.join(SUITES)}")
    import_module(f"phi_bench.suites.{SUITES[name][0]}").main(argv)
