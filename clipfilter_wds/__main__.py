"""``python -m clipfilter_wds``."""

from clipfilter_wds.cli import main

main()
