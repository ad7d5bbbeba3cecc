"""Data sets → examples → batches with label masks."""

from hyperfade.data.collate import Collator
from hyperfade.data.examples import Example, Skipped, open_image
from hyperfade.data.sources import Source, open_source

__all__ = ["Collator", "Example", "Skipped", "Source", "open_image", "open_source"]
