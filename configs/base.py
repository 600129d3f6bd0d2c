"""What every section of settings is made of: the frozen model, and the marks of its fields.

In: nothing. Out: `Settings`, and what enters a fingerprint of it. Knows no setting.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of all settings: immutable; an unknown key is an error that names it; numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def speed(default: Any, description: str, **bounds: Any) -> Any:
    """A field that affects speed or machines only and therefore stays out of the fingerprint."""
    return Field(default, description=description, json_schema_extra={"speed": True}, **bounds)


def later(default: Any, description: str, **bounds: Any) -> Any:
    """A threshold on stored measurements: it enters the fingerprint, but a change is applied without the slide."""
    return Field(default, description=description, json_schema_extra={"later": True}, **bounds)


def added(default: Any, description: str, **bounds: Any) -> Any:
    """A field that came after runs were recorded without it: at its default, which is what was done before, it stays
    out of the fingerprint, and those runs are still themselves."""
    return Field(default, description=description, json_schema_extra={"added": True}, **bounds)


def changed(default: Any, before: Any, description: str, **bounds: Any) -> Any:
    """A field that came after runs were recorded without it, and whose default is not what was done then: at `before`,
    which is, it stays out of the fingerprint. `as_begun` is for a run that was begun without it."""
    return Field(default, description=description, json_schema_extra={"changed": True, "before": before}, **bounds)


def apart(default: Any, description: str, **bounds: Any) -> Any:
    """A field that decides the results of what uses it alone, and enters the fingerprints of that only: what does not
    use it keeps the fingerprint that it had before there was such a field."""
    return Field(default, description=description, json_schema_extra={"apart": True}, **bounds)


def marked(settings: type[Settings], mark: str) -> frozenset[str]:
    """Names of the fields that carry `mark` ("speed", "later", "added", "changed" or "apart")."""
    extras = {name: field.json_schema_extra for name, field in settings.model_fields.items()}
    return frozenset(name for name, extra in extras.items() if isinstance(extra, dict) and extra.get(mark))


def before(settings: type[Settings]) -> dict[str, Any]:
    """Field -> what was done before there was such a field, of those whose default is something else."""
    extras = {name: settings.model_fields[name].json_schema_extra for name in marked(settings, "changed")}
    return {name: extra["before"] for name, extra in extras.items() if isinstance(extra, dict)}


def fingerprint_fields(settings: Settings) -> dict[str, Any]:
    """The result-affecting fields of `settings` as plain JSON values, in schema order."""
    dumped, fields = settings.model_dump(mode="json"), type(settings).model_fields
    left_out = marked(type(settings), "speed") | marked(type(settings), "apart")
    for name in marked(type(settings), "added"):
        if getattr(settings, name) == fields[name].get_default(call_default_factory=True):
            left_out |= {name}
    left_out |= {name for name, value in before(type(settings)).items() if getattr(settings, name) == value}
    return {name: dumped[name] for name in fields if name not in left_out}
