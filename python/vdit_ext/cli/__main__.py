"""``python -m vdit_ext.cli``."""

from .app import main

main()
