"""`training/summary.json`: the outcome of a finished run."""

from phi_runtime.contract import Contract


class Summary(Contract, frozen=True):
    """What a finished run learned. Losses are nats per held-out token with a loss; of DPO its own, per pair.

    unigram_loss: of a unigram model of the same tokens, None where the data are examples.
    """

    parameters: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    initial_loss: float
    final_loss: float
    unigram_loss: float | None
    heldout_tokens: int
