"""What others already do well, joined on."""
