"""Train the phases that are not trained yet.

`ray job submit -- python ray_jobs/train.py --config CONFIG [KEY=VALUE ...]`
"""

from _entry import main

if __name__ == "__main__":
    main("train")
