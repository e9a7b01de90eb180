"""`python -m minisupernet`: the commands of the course."""

import sys

from minisupernet.course.commands import main

if __name__ == "__main__":
    sys.exit(main())
