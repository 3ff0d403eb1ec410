"""Outcomes of the models that a run met: the codes of the column `outcome`, and the refusal that carries one."""

from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from modeling_wsl.checkpoints.errors import (
    CheckpointError,
    NonFiniteWeightsError,
    NotTokenizableError,
    NoWeightsError,
    PartOfModelError,
    QuantizedError,
    TooFewParametersError,
)
from modeling_wsl.checkpoints.hub import hub_error

from .schema import ACCEPTED


# In the order in which `hf-wsl collect` can tell: from the listing, the metadata, the header, the weights, the others.
OUTCOMES = {
    ACCEPTED: "its windows are in the dataset",
    "gated": "its owner gives access on request",
    "disabled": "the Hub has disabled it",
    "vanished": "it was listed and is gone, or private by now",
    "license": "its license is not among those asked for",
    "remote_code": "only code of its own repository can load it",
    "no_weights": "no weight file of a format that is read",
    "part": "one of several parts of a model, the others missing or not to be joined",
    "quantized": "its weights are codes of a scheme that is not dequantized",
    "too_small": "fewer parameters than asked for",
    "too_large": "more parameters or bytes than asked for",
    "unloadable": "neither transformers nor timm can build what its config names",
    "missing_weights": "its architecture has tensors that the files lack",
    "unexpected_weights": "the files have tensors that its architecture lacks",
    "mismatched_weights": "a tensor has another shape than its architecture's",
    "damaged": "a file is cut off, contradicts itself, has other bytes than promised, or holds code",
    "not_finite": "a weight is NaN or infinite",
    "overflow": "a weight is beyond the range of the stored dtype",
    "not_tokenizable": "no floating-point tensor to make tokens of",
    "duplicate": "its weights are bit for bit those of a model before it",
    "other_layers": "it has layers that no training model has, so nothing normalizes them",
    "network": "its files could not be fetched, while the Hub answered for others",
}
# The Hub's client's errors that stay the same when it is asked again.
FINAL_ANSWERS = {
    GatedRepoError: "gated",  # a RepositoryNotFoundError too, so it comes first
    DisabledRepoError: "disabled",
    RepositoryNotFoundError: "vanished",
    RevisionNotFoundError: "vanished",
    EntryNotFoundError: "vanished",
}


class RefusedModel(CheckpointError):
    """A model that does not enter the dataset.

    Attributes:
        outcome: one of `OUTCOMES`.
    """

    def __init__(self, source: object, outcome: str, reason: str, advice: str):
        super().__init__(source, reason, advice)
        self.outcome = outcome

    def __reduce__(self):
        return type(self), (self.source, self.outcome, self.reason, self.advice)


def outcome_of(error: CheckpointError) -> str:
    """The code of an error that was raised while a model was read; "network" where the Hub was out of reach."""
    if isinstance(error, RefusedModel):
        return error.outcome
    if isinstance(error, NonFiniteWeightsError):
        return "not_finite"
    if isinstance(error, NoWeightsError):
        return "no_weights"
    if isinstance(error, QuantizedError):
        return "quantized"
    if isinstance(error, NotTokenizableError):
        return "not_tokenizable"
    if isinstance(error, PartOfModelError):
        return "part"
    if isinstance(error, TooFewParametersError):
        return "too_small"
    cause = error.__cause__
    if final := final_outcome(cause):
        return final
    # What the Hub's client raises has no common class; a damaged file has a cause as well, but not these words.
    if cause is not None and error.reason == hub_error(error.source, None, cause).reason:
        return "network"
    return "damaged"


def final_outcome(error: BaseException | None) -> str | None:
    """The outcome code of an answer of the Hub that stays the same when it is asked again; None of another error."""
    if isinstance(error, LocalEntryNotFoundError):  # the client's word for a Hub that it cannot reach
        return None
    return next((outcome for kind, outcome in FINAL_ANSWERS.items() if isinstance(error, kind)), None)
