"""The command line."""

from clipfilter_wds.cli.program import main as main
