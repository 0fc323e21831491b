"""The parametrisations that PEFT supports besides LoRA, DoRA and AdaLoRA."""

from __future__ import annotations

from typing import Any

from lorax.interop import peft_low_rank, peft_maps, peft_projected
from lorax.interop.peft_forms import Form

FORMS: dict[str, Form] = {
    form.adapter: form
    for forms in (peft_low_rank.FORMS, peft_maps.FORMS, peft_projected.FORMS)
    for form in forms
}
"""The forms by our registered names."""


def register(form: Form) -> Form:
    """Adds a form for a parametrisation defined elsewhere.

    Raises:
      ValueError: another form has this name or type.
    """
    if form.adapter in FORMS or of_type(form.peft_type):
        raise ValueError(
            f"{form.adapter!r} as PEFT's {form.peft_type!r}: one of the two already "
            "has a form"
        )
    FORMS[form.adapter] = form
    return form


def of_type(peft_type: Any) -> Form | None:
    """Returns the form of a PEFT type, or None if there is none."""
    return next((f for f in FORMS.values() if f.peft_type == peft_type), None)
