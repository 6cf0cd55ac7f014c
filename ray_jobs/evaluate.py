"""Sample the systems on the held-out prompts and compare them.

`ray job submit -- python ray_jobs/evaluate.py --config CONFIG [KEY=VALUE ...]`
"""

from _entry import main

if __name__ == "__main__":
    main("evaluate")
