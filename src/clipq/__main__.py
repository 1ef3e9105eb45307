"""``python -m clipq``, the same as the ``clipq`` command."""

from clipq.cli import main

main()
