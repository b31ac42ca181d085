"""`python -m tests.mutations [PART]`, see run.py.

Processes that run.py starts import its functions by name, which they cannot from this file.
"""

import sys

from .run import main

sys.exit(main(*sys.argv[1:2]))
