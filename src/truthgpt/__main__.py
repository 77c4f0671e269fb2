"""`python -m truthgpt` is `truthgpt`."""

from truthgpt.cli.app import main

main()
