"""The command line."""

from clipfilter_wds.cli.commands import main as main
