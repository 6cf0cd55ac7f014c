"""Run all stages.

`ray job submit -- python ray_jobs/distill.py --config CONFIG [KEY=VALUE ...]`
"""

from _entry import main

if __name__ == "__main__":
    main("run")
