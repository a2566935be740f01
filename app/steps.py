"""The third tab: the numbers of every step, and attention that people change."""

import math
from typing import Any, NamedTuple

from captioner import Caption

from .service import Refused, Service, number, shown


class Change(NamedTuple):
    """How attention is changed at every step; see `captioner.explain.explain`."""

    temperature: float | None = None
    context: bool = True


AS_IT_IS = Change()


def read_change(question: Any) -> Change | Refused:
    """The change in the question of steps.js, which may be any JSON; None for no change. What is wrong is returned.

    JSON has no infinity: an even map is the temperature "even".
    """
    values = {} if question is None else question
    if not isinstance(values, dict):
        return Refused(f"The question should be an object, not {shown(question)}.")
    temperature, context = values.get("temperature"), values.get("context", True)
    if not isinstance(context, bool):
        return Refused(f"Context should be true or false, not {shown(context)}.")
    if temperature == "even":
        return Change(math.inf, context)
    try:
        return Change(
            None if temperature is None else number("temperature of attention", temperature, 0, 1000), context
        )
    except Refused as error:
        return error


def steps_of_page(service: Service, model: str, caption: Caption, change: Change = AS_IT_IS) -> dict[str, Any]:
    """The value of steps.js.

    Returns:
        steps: see `captioner.explain.Explanation.to_dict`; mechanism: the name of the model's attention; gate: whether
        its context vector can be left out; question: the change, as steps.js asked for it.

    Raises:
        Refused: attention of this model cannot be changed in this way.
    """
    try:
        steps = service.explain(caption, model, **change._asdict())
    except ValueError as error:
        raise Refused(f"Attention of this model cannot be changed in this way: {error}.") from error
    even = change.temperature == math.inf
    return {
        "steps": steps,
        "mechanism": service.captioner(model).config.attention,
        "gate": bool(steps) and steps[0]["beta"] is not None and len(steps[0]["entropies"]) == 1,
        "question": {"temperature": "even" if even else change.temperature, "context": change.context},
    }
