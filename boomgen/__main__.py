import sys

from boomgen.cli import main

sys.exit(main())
