"""`python -m hyperfade`."""

from hyperfade.cli import main

main()
