"""Sample and compare the systems: `ray job submit -- python ray_jobs/evaluate.py --config CONFIG [KEY=VALUE ...]`."""

from _entry import main

if __name__ == "__main__":
    main("evaluate")
