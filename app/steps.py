"""The third tab: the numbers of every step, of one model or two, and attention that people change."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from captioner import Caption

from .equations import equations
from .service import Refused, Service, number, shown


class Change(NamedTuple):
    """How attention is changed at every step; see `captioner.explain.explain`."""

    temperature: float | None = None
    context: bool = True


class Question(NamedTuple):
    """What the third tab asks.

    change: how attention is changed, that of both models.
    second: name of the model whose numbers stand beside those of the first; None for none.
    """

    change: Change = Change()
    second: str | None = None


AS_IT_IS = Change()


def read_question(value: Any) -> Question | Refused:
    """The question of steps.js, which may be any JSON; None for no question. What is wrong is returned.

    JSON has no infinity: an even map is the temperature "even".
    """
    values = {} if value is None else value
    if not isinstance(values, dict):
        return Refused(f"The question should be an object, not {shown(value)}.")
    temperature, context, second = values.get("temperature"), values.get("context", True), values.get("second")
    if not isinstance(context, bool):
        return Refused(f"Context should be true or false, not {shown(context)}.")
    if not (second is None or isinstance(second, str)):
        return Refused(f"The second model should be a name, not {shown(second)}.")
    if temperature == "even":
        return Question(Change(math.inf, context), second)
    try:
        if temperature is not None:
            temperature = number("temperature of attention", temperature, 0, 1000)
    except Refused as error:
        return error
    return Question(Change(temperature, context), second)


def board_of(service: Service, model: str, caption: Caption, change: Change = AS_IT_IS) -> dict[str, Any]:
    """The numbers of one model for steps.js.

    Where attention of the model cannot be changed in this way, its numbers are those of attention as it is.

    Returns:
        model: its name; steps: see `captioner.explain.Explanation.to_dict`; equations: the lines of each step; before:
        the likeliest word of each step and its probability with attention as it is, or None if that is shown; gate:
        whether the context vector can be left out; layers: of a transformer, or None; problem: a sentence that says why
        attention is not changed, or None.
    """
    config = service.captioner(model).config
    steps, before, problem = service.explain(caption, model), None, None
    if change != AS_IT_IS:
        try:
            plain, steps = steps, service.explain(caption, model, **change._asdict())
            before = [step.to_dict()["candidates"][0] for step in plain]
        except ValueError as error:
            change, problem = AS_IT_IS, f"Attention of this model cannot be changed in this way: {error}."
    return {
        "model": model,
        "steps": [step.to_dict() for step in steps],
        "equations": [equations(step, config, **change._asdict()) for step in steps],
        "before": before,
        "gate": bool(steps) and steps[0].beta is not None and steps[0].head_weights is None,
        "layers": config.layers if config.decoder == "transformer" else None,
        "problem": problem,
    }


def steps_value(boards: Sequence[dict[str, Any]], question: Question) -> dict[str, Any]:
    """The value of steps.js.

    Returns:
        boards: the first model's, then the second's; see `board_of`. That of a model that failed has its name and a
        sentence, `error`. question: as steps.js asked it.
    """
    (temperature, context), second = question
    temperature_shown = "even" if temperature == math.inf else temperature
    return {
        "boards": list(boards),
        "question": {"temperature": temperature_shown, "context": context, "second": second},
    }


def first_value(boards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The value of steps.js before it asked: the boards of the first two models that were chosen, if any were."""
    second = boards[1]["model"] if len(boards) > 1 else None
    return steps_value(boards[:2], Question(second=second)) if boards else {}
