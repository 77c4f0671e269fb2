"""`python -m truthgpt` is `truthgpt`."""

from truthgpt.cli.start import main

main()
