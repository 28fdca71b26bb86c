"""`python -m epplan` is the command `epplan`."""

from epplan.cli import main

main()
