"""What all sections of a recipe are made of: values that never change, with no unknown keys."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Keys of a recipe that belong together: never changed, and an unknown one is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _number_in_text(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` (no dot) as text; it means a number here."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_number_in_text), Field(allow_inf_nan=False)]
