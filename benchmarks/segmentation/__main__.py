"""`python -m benchmarks.segmentation`."""

import sys

from benchmarks.segmentation.run import main

if __name__ == "__main__":
    sys.exit(main())
