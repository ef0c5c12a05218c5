"""What the model of a core must have in common with that of the core before it."""

from footplate.protocol.errors import EngineDeadError, EngineError
from footplate.protocol.messages import ModelFacts

# For streams to go on at all, and for them to go on exactly.
ARCHITECTURE = ("architecture", "vocab_size", "eos_token_ids")
MODEL = (*ARCHITECTURE, "model", "dtype", "quantization", "num_parameters")


def require_same_model(before: ModelFacts, after: ModelFacts) -> None:
    """Raise EngineDeadError unless streams go on exactly in a core that has come by itself."""
    for name, old, new in _differences(before, after, MODEL):
        raise EngineDeadError(
            f"the engine core came back with another model: {name} was {old!r}, is {new!r}"
        )


def require_same_architecture(before: ModelFacts, after: ModelFacts) -> None:
    """Raise EngineError unless streams can go on in a core that `replace_core` was asked for."""
    for name, old, new in _differences(before, after, ARCHITECTURE):
        raise EngineError(
            f"replace_core was asked for model={after.model!r}, in which no stream can go on: its "
            f"{name} is {new!r}, and must be {old!r} as that of {before.model!r}, which goes on "
            "serving; for another architecture or vocabulary build another engine"
        )


def _differences(
    before: ModelFacts, after: ModelFacts, names: tuple[str, ...]
) -> list[tuple[str, object, object]]:
    pairs = [(name, getattr(before, name), getattr(after, name)) for name in names]
    return [(name, old, new) for name, old, new in pairs if old != new]
