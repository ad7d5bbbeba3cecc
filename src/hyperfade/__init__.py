"""hyperfade: dense feed-forward layers fade out, hypercomplex ones fade in."""
