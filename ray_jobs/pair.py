"""Build the pairs.

`ray job submit -- python ray_jobs/pair.py --config CONFIG [KEY=VALUE ...]`
"""

from _entry import main

if __name__ == "__main__":
    main("pair")
