"""Data sets → examples → batches with label masks."""

from hyperfade.data.collate import Collator
from hyperfade.data.examples import Example, Skipped, open_image
from hyperfade.data.sources import Source, fingerprint, open_source
from hyperfade.data.watch import SlowDataWarning, named_when_slow

__all__ = [
    "Collator",
    "Example",
    "Skipped",
    "SlowDataWarning",
    "Source",
    "fingerprint",
    "named_when_slow",
    "open_image",
    "open_source",
]
