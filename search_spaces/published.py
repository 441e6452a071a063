"""What tables of spaces say of the published architectures in them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from search_spaces.base import Published


class PublishedModel(BaseModel):
    """Published figures of an entry under `references`; a subclass adds how the architecture is written.

    Args:
        macs, params, source, options: see `Published`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    macs: int | str | None = None
    params: int | str | None = None
    source: str = ""
    options: dict[str, Any] = {}

    @property
    def published(self) -> Published:
        """The figures alone."""
        return Published(self.macs, self.params, self.source, self.options)
