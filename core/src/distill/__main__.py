"""``python -m distill``: what torchrun starts."""

from distill.cli import main

main(prog_name="distill")
