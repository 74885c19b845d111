"""`python -m phalanx` is the command `phalanx`."""

from phalanx._cli import main

main()
